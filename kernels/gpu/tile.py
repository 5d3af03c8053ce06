"""A block with 16-byte loads, read twice: from memory for its amax, from the cache for its codes.

Holding the block in registers between the two would allow two programs on a multiprocessor, which
is too few to keep its memory busy. The second reading finds the block in L1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.gpu.cast import encode_words
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
from fp8sync_kernels.gpu.digest import total, word_terms
from fp8sync_kernels.gpu.scale import MAGNITUDE_MASK

BLOCK = tl.constexpr(128)
SLICE = tl.constexpr(32)


@triton.jit
def load_amax_bits(
    desc: tl.tensor, block_row: tl.tensor, block_col: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """Largest magnitude of the block as fp32 bits, where NaN counts as the largest of all."""
    values, _row, _first, _inside = _load_rows(desc, block_row, block_col, 0, DTYPE, BLOCK)
    return _amax_bits(values, DTYPE)


@triton.jit
def encode_tile(
    desc: tl.tensor,
    digests: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
    multiplier: tl.tensor,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Multiply, cast, store if there is a destination; returns the uint64 digest of the codes."""
    address = tl.load(desc + DESTINATION)
    destination = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 8)
    stride = tl.multiple_of(tl.load(desc + DESTINATION_STRIDE) >> 2, 4)
    first_word = (tl.load(desc + DIGEST_BASE) >> 2).to(tl.uint32)
    pitch = (tl.load(desc + DIGEST_PITCH) >> 2).to(tl.uint32)
    cols = tl.multiple_of(tl.load(desc + COLS).to(tl.int32) >> 2, 4)
    value = tl.full([], 0, tl.uint64)
    terms = tl.full([SLICE, BLOCK // 4], 0, tl.uint64)
    for start in range(0, BLOCK, SLICE):
        values, row, first_col, row_inside = _load_rows(
            desc, block_row, block_col, start, DTYPE, SLICE
        )
        if tl.uint8 == DTYPE:
            values = values.to(tl.float8e4nv, bitcast=True)
        words = encode_words(values.to(tl.float32) * multiplier, SLICE, BLOCK)
        col = tl.multiple_of(first_col >> 2, 4) + tl.arange(0, BLOCK // 4)
        if address != 0:
            inside = row_inside[:, None] & ((col >= 0) & (col < cols))[None, :]
            tl.store(destination + row[:, None] * stride + col[None, :], words, mask=inside)
        if digests is not None:
            line = first_word + row.to(tl.uint32) * pitch
            terms += word_terms(words, line[:, None] + col.to(tl.uint32)[None, :])
    if digests is not None:
        value = total(terms)
    return value


@triton.jit
def _amax_bits(values: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Largest magnitude of a tile.

    Narrow sources are compared as they are, so that they need not be held in fp32 meanwhile.
    """
    if tl.uint8 == DTYPE:
        largest = tl.max(values.to(tl.int32) & 0x7F).to(tl.uint8)
        widened = largest.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        bits = widened.to(tl.int32, bitcast=True)
    elif DTYPE.primitive_bitwidth == 16:
        magnitude = values.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        largest = tl.max(magnitude).to(tl.int16)
        widened = largest.to(DTYPE, bitcast=True).to(tl.float32)
        bits = widened.to(tl.int32, bitcast=True)
    else:
        magnitude = values.to(tl.int32, bitcast=True) & MAGNITUDE_MASK
        bits = tl.max(magnitude)
    return bits


@triton.jit
def _load_rows(
    desc: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
    start: tl.tensor,
    DTYPE: tl.constexpr,
    COUNT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """([COUNT, 128] with 0 outside the rectangle, row, first column, which rows are inside)."""
    source = tl.multiple_of(tl.load(desc + SOURCE).to(tl.pointer_type(DTYPE)), 16)
    stride = tl.multiple_of(tl.load(desc + SOURCE_STRIDE), 128 // DTYPE.primitive_bitwidth)
    cols = tl.multiple_of(tl.load(desc + COLS).to(tl.int32), 16)
    col_origin = tl.multiple_of(tl.load(desc + COL_ORIGIN).to(tl.int32), 16)
    first_row = block_row * BLOCK - tl.load(desc + ROW_ORIGIN).to(tl.int32) + start
    row = first_row + tl.arange(0, COUNT)
    first_col = block_col * BLOCK - col_origin
    col = first_col + tl.arange(0, BLOCK)
    row_inside = (row >= 0) & (row < tl.load(desc + ROWS).to(tl.int32))
    inside = row_inside[:, None] & ((col >= 0) & (col < cols))[None, :]
    values = tl.load(source + row[:, None] * stride + col[None, :], mask=inside, other=0)
    return values, row, first_col, row_inside
