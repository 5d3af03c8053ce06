# ruff: noqa: SIM102 - the outer test is decided at compile time, the inner one is not
"""Bringing descriptors into the L2 cache before anybody asks for them.

A small matrix brings a row that no cache holds. Its programs would wait for memory twice, for
block_row and then for the row, before they could ask for data.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.gpu.cast import INTERPRETED
from fp8sync_kernels.gpu.columns import ROW_LENGTH

_LINE = tl.constexpr(32)  # blocks in a cache line of block_row
# A program starts every 12 ns or so; memory under load answers within a microsecond or two.
_AHEAD = tl.constexpr(1024)


@triton.jit
def prefetch_rows(later: tl.tuple) -> None:
    """Now and then, ask for the rows of a cache line of blocks to come: its first and its last.

    Call it when the tile is on its way: at the start of a program, its waiting costs a percent or two.

    later: table, block_row, this program's block and the number of blocks.
    """
    table, block_row, block, blocks = later
    if block_row is not None and not INTERPRETED:
        if block % _LINE == 0:
            first = tl.load(block_row + tl.minimum(block + _AHEAD, blocks - 1))
            last = tl.load(block_row + tl.minimum(block + _AHEAD + _LINE - 1, blocks - 1))
            _prefetch(table + first.to(tl.int64) * ROW_LENGTH)
            _prefetch(table + last.to(tl.int64) * ROW_LENGTH)


@triton.jit
def _prefetch(row: tl.tensor) -> None:
    """Both cache lines of a row. Nobody waits for a prefetch."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; prefetch.global.L2 [$1 + 128]; mov.u32 $0, 0;",
        "=r,l",
        [row.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
