"""The grouped kernel: one launch for everything a descriptor table lists.

``block_row[b]`` names the row that block b belongs to: one load in the place of a search. PATHS, a
compile-time set, keeps the code and the registers of loops that the table does not use out of the
kernel.
"""

# ruff: noqa: C901, SIM102 - the outer tests are decided at compile time, the inner ones are not

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.descriptor import COUNTED, CUT, DIVISION, Path
from fp8sync_kernels.gpu.canonical import canonical_block
from fp8sync_kernels.gpu.columns import BLOCK_COLS, FIRST_BLOCK, PATH, ROW_LENGTH
from fp8sync_kernels.gpu.copy import cast_elements, copy_bytes, copy_words
from fp8sync_kernels.gpu.quantize import quantize_block

_WIDE_BF16 = tl.constexpr(int(Path.WIDE_BF16))
_WIDE_FP16 = tl.constexpr(int(Path.WIDE_FP16))
_WIDE_FP32 = tl.constexpr(int(Path.WIDE_FP32))
_WIDE_CODES = tl.constexpr(int(Path.WIDE_CODES))
_ANY_BF16 = tl.constexpr(int(Path.ANY_BF16))
_ANY_FP16 = tl.constexpr(int(Path.ANY_FP16))
_ANY_FP32 = tl.constexpr(int(Path.ANY_FP32))
_ANY_CODES = tl.constexpr(int(Path.ANY_CODES))
_COPY_16 = tl.constexpr(int(Path.COPY_16))
_COPY_4 = tl.constexpr(int(Path.COPY_4))
_COPY_1 = tl.constexpr(int(Path.COPY_1))
_CAST = tl.constexpr(int(Path.CAST))
_DIVISION = tl.constexpr(DIVISION)
_CUT = tl.constexpr(CUT)
_COUNTED = tl.constexpr(COUNTED)
_PATH_BITS = tl.constexpr(DIVISION - 1)

_LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)
_LARGEST_FP16 = tl.constexpr(65504.0)
_LARGEST_FP32 = tl.constexpr(3.4028234663852886e38)


# Everything is read and added to one element at a time: alignment would make other kernels, no other code.
@triton.jit(
    do_not_specialize=["blocks"],
    do_not_specialize_on_alignment=["table", "block_row", "digests", "nonfinite"],
)
def bucket_kernel(
    table: tl.tensor,
    block_row: tl.tensor,
    digests: tl.tensor,
    nonfinite: tl.tensor,
    blocks: tl.tensor,
    PATHS: tl.constexpr,
    LOOP: tl.constexpr,
) -> None:
    """Run a table: int64 [rows, COLUMNS], int32 [blocks], int64 [slots] twice, or None.

    block_row: None if there is one row: nothing to wait for before its own loads.
    LOOP: programs take more than one block each; otherwise there is one program for each block.
    """
    block = tl.program_id(0)
    if LOOP:
        while block < blocks:
            _run_block(table, block_row, digests, nonfinite, block, blocks, PATHS)
            block += tl.num_programs(0)
    else:
        _run_block(table, block_row, digests, nonfinite, block, blocks, PATHS)


@triton.jit
def _run_block(
    table: tl.tensor,
    block_row: tl.tensor,
    digests: tl.tensor,
    nonfinite: tl.tensor,
    block: tl.tensor,
    blocks: tl.tensor,
    PATHS: tl.constexpr,
) -> None:
    desc = table
    if block_row is not None:
        desc += tl.load(block_row + block).to(tl.int64) * ROW_LENGTH
    later = (table, block_row, block, blocks)
    path = tl.load(desc + PATH)
    divides: tl.constexpr = (_DIVISION & PATHS) != 0
    cut: tl.constexpr = (_CUT & PATHS) != 0
    counted: tl.constexpr = (_COUNTED & PATHS) != 0
    only: tl.constexpr = _PATH_BITS & PATHS
    alone: tl.constexpr = only % _COPY_16 == 0
    local = (block - tl.load(desc + FIRST_BLOCK).to(tl.int32)).to(tl.uint32)
    across = tl.load(desc + BLOCK_COLS).to(tl.uint32)
    i = (local // across).to(tl.int32)
    j = (local % across).to(tl.int32)
    if _WIDE_BF16 & PATHS:
        if only == _WIDE_BF16 or path == _WIDE_BF16:
            quantize_block(
                desc,
                later,
                i,
                j,
                digests,
                nonfinite,
                tl.bfloat16,
                _LARGEST_BF16,
                True,
                divides,
                cut,
            )
    if _WIDE_FP16 & PATHS:
        if only == _WIDE_FP16 or path == _WIDE_FP16:
            quantize_block(
                desc, later, i, j, digests, nonfinite, tl.float16, _LARGEST_FP16, True, divides, cut
            )
    if _WIDE_FP32 & PATHS:
        if only == _WIDE_FP32 or path == _WIDE_FP32:
            quantize_block(
                desc, later, i, j, digests, nonfinite, tl.float32, _LARGEST_FP32, True, divides, cut
            )
    if _WIDE_CODES & PATHS:
        if digests is not None:
            if only == _WIDE_CODES or path == _WIDE_CODES:
                canonical_block(desc, later, i, j, digests, True, cut)
    if _ANY_BF16 & PATHS:
        if only == _ANY_BF16 or path == _ANY_BF16:
            quantize_block(
                desc,
                later,
                i,
                j,
                digests,
                nonfinite,
                tl.bfloat16,
                _LARGEST_BF16,
                False,
                divides,
                cut,
            )
    if _ANY_FP16 & PATHS:
        if only == _ANY_FP16 or path == _ANY_FP16:
            quantize_block(
                desc,
                later,
                i,
                j,
                digests,
                nonfinite,
                tl.float16,
                _LARGEST_FP16,
                False,
                divides,
                cut,
            )
    if _ANY_FP32 & PATHS:
        if only == _ANY_FP32 or path == _ANY_FP32:
            quantize_block(
                desc,
                later,
                i,
                j,
                digests,
                nonfinite,
                tl.float32,
                _LARGEST_FP32,
                False,
                divides,
                cut,
            )
    if _ANY_CODES & PATHS:
        if digests is not None:
            if only == _ANY_CODES or path == _ANY_CODES:
                canonical_block(desc, later, i, j, digests, False, cut)
    if _COPY_16 & PATHS:
        if only == _COPY_16 or path == _COPY_16:
            copy_words(desc, i, j, digests, nonfinite, True, 32 if alone else 16, counted)
    if _COPY_4 & PATHS:
        if only == _COPY_4 or path == _COPY_4:
            copy_words(desc, i, j, digests, nonfinite, False, 8, counted)
    if _COPY_1 & PATHS:
        if only == _COPY_1 or path == _COPY_1:
            copy_bytes(desc, i, j, digests, nonfinite, counted)
    if _CAST & PATHS:
        if only == _CAST or path == _CAST:
            cast_elements(desc, i, j, digests, nonfinite)
