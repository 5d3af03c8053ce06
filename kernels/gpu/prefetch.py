"""Bringing descriptors into the L2 cache before anybody asks for them.

A small matrix brings a row that no cache holds. Its programs would wait for memory twice, for
block_row and then for the row, before they could ask for data.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.gpu.cast import INTERPRETED
from fp8sync_kernels.gpu.columns import ROW_LENGTH

PREFETCHED = tl.constexpr(32)  # blocks in a cache line of block_row


@triton.jit
def prefetch_rows(
    table: tl.tensor, block_row: tl.tensor, block: tl.tensor, blocks: tl.tensor
) -> None:
    """Ask for the rows of PREFETCHED blocks from `block` on: of the first and of the last."""
    if not INTERPRETED:
        first = tl.load(block_row + tl.minimum(block, blocks - 1))
        last = tl.load(block_row + tl.minimum(block + PREFETCHED - 1, blocks - 1))
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
