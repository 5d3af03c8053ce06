"""A block in slices of 8 rows, read twice, at any alignment: the slow way, for rare blocks.

It holds little at a time, so that a launch which can meet such blocks has the registers of one that
cannot.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.gpu.columns import (
    COL_ORIGIN,
    COLS,
    DESTINATION,
    DESTINATION_STRIDE,
    DIGEST_BASE,
    DIGEST_PITCH,
    ROW_ORIGIN,
    ROWS,
    SOURCE,
    SOURCE_STRIDE,
)
from fp8sync_kernels.gpu.digest import element_terms, total
from fp8sync_kernels.gpu.scale import INF_BITS, MAGNITUDE_MASK

BLOCK = tl.constexpr(128)
# At least 4 elements a thread: Triton 3.6 converts 2 to FP8 wrongly.
SLICE = tl.constexpr(8)


@triton.jit
def sliced_amax_bits(
    desc: tl.tensor, block_row: tl.tensor, block_col: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """Largest magnitude of the block as fp32 bits; infinity if anything in it is not finite."""
    amax_bits = tl.full([], 0, tl.int32)
    for start in range(0, BLOCK, SLICE):
        x, _row, _col, _inside = _load_slice(desc, block_row, block_col, start, DTYPE)
        bits = x.to(tl.int32, bitcast=True) & MAGNITUDE_MASK
        amax_bits = tl.maximum(amax_bits, tl.max(bits))
    return tl.minimum(amax_bits, INF_BITS)


@triton.jit
def sliced_nonfinite(
    desc: tl.tensor, block_row: tl.tensor, block_col: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """Number of NaN and infinite elements of the block, int64."""
    count = tl.full([], 0, tl.int32)
    for start in range(0, BLOCK, SLICE):
        x, _row, _col, _inside = _load_slice(desc, block_row, block_col, start, DTYPE)
        bits = x.to(tl.int32, bitcast=True) & MAGNITUDE_MASK
        count += tl.sum((bits >= INF_BITS).to(tl.int32))
    return count.to(tl.int64)


@triton.jit
def encode_slices(
    desc: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
    multiplier: tl.tensor,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Multiply, cast, store if there is a destination; returns the uint64 digest of the codes."""
    destination = tl.load(desc + DESTINATION)
    stride = tl.load(desc + DESTINATION_STRIDE)
    base = tl.load(desc + DIGEST_BASE)
    pitch = tl.load(desc + DIGEST_PITCH)
    value = tl.full([], 0, tl.uint64)
    for start in range(0, BLOCK, SLICE):
        x, row, col, inside = _load_slice(desc, block_row, block_col, start, DTYPE)
        codes = (x * multiplier).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        if destination != 0:
            pointer = destination.to(tl.pointer_type(tl.uint8))
            tl.store(pointer + row[:, None] * stride + col[None, :], codes, mask=inside)
        # The line begins at the block's first column; inside a rectangle with an origin the
        # columns before the rectangle's first are 0 and count for nothing.
        line = base + row * pitch + block_col * BLOCK - tl.load(desc + COL_ORIGIN)
        offset = tl.arange(0, BLOCK).to(tl.uint32)
        value += total(element_terms(codes.to(tl.uint32), line[:, None], offset[None, :]))
    return value


@triton.jit
def _load_slice(
    desc: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
    start: tl.tensor,
    DTYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    source = tl.load(desc + SOURCE).to(tl.pointer_type(DTYPE))
    stride = tl.load(desc + SOURCE_STRIDE)
    first = block_row * BLOCK - tl.load(desc + ROW_ORIGIN).to(tl.int32) + start
    row = first + tl.arange(0, SLICE)
    col = block_col * BLOCK - tl.load(desc + COL_ORIGIN).to(tl.int32) + tl.arange(0, BLOCK)
    row_inside = (row >= 0) & (row < tl.load(desc + ROWS).to(tl.int32))
    col_inside = (col >= 0) & (col < tl.load(desc + COLS).to(tl.int32))
    inside = row_inside[:, None] & col_inside[None, :]
    values = tl.load(source + row[:, None] * stride + col[None, :], mask=inside, other=0)
    if tl.uint8 == DTYPE:
        values = values.to(tl.float8e4nv, bitcast=True)
    return values.to(tl.float32), row, col, inside
