"""A whole 128x128 block in registers, with 16-byte accesses: the fast way."""

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
from fp8sync_kernels.gpu.digest import pack_words, total, word_terms
from fp8sync_kernels.gpu.scale import MAGNITUDE_MASK

BLOCK = tl.constexpr(128)


@triton.jit
def load_block(
    desc: tl.tensor, block_row: tl.tensor, block_col: tl.tensor, DTYPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """([128, 128] of DTYPE with 0 outside the rectangle, row, col, inside)."""
    source = tl.multiple_of(tl.load(desc + SOURCE).to(tl.pointer_type(DTYPE)), 16)
    stride = tl.multiple_of(tl.load(desc + SOURCE_STRIDE), 128 // DTYPE.primitive_bitwidth)
    cols = tl.multiple_of(tl.load(desc + COLS).to(tl.int32), 16)
    col_origin = tl.multiple_of(tl.load(desc + COL_ORIGIN).to(tl.int32), 16)
    row = block_row * BLOCK - tl.load(desc + ROW_ORIGIN).to(tl.int32) + tl.arange(0, BLOCK)
    col = block_col * BLOCK - col_origin + tl.arange(0, BLOCK)
    row_inside = (row >= 0) & (row < tl.load(desc + ROWS).to(tl.int32))
    inside = row_inside[:, None] & ((col >= 0) & (col < cols))[None, :]
    values = tl.load(source + row[:, None] * stride + col[None, :], mask=inside, other=0)
    return values, row, col, inside


@triton.jit
def tile_amax_bits(values: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Largest magnitude of a tile as fp32 bits, where NaN counts as the largest of all.

    Narrow sources are compared as they are, so that they need not be held in fp32 meanwhile.
    """
    if tl.uint8 == DTYPE:
        largest = tl.max(tl.max(values.to(tl.int32) & 0x7F, axis=1), axis=0).to(tl.uint8)
        widened = largest.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        bits = widened.to(tl.int32, bitcast=True)
    elif DTYPE.primitive_bitwidth == 16:
        magnitude = values.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        largest = tl.max(tl.max(magnitude, axis=1), axis=0).to(tl.int16)
        widened = largest.to(DTYPE, bitcast=True).to(tl.float32)
        bits = widened.to(tl.int32, bitcast=True)
    else:
        magnitude = values.to(tl.int32, bitcast=True) & MAGNITUDE_MASK
        bits = tl.max(tl.max(magnitude, axis=1), axis=0)
    return bits


@triton.jit
def store_codes(
    desc: tl.tensor, codes: tl.tensor, row: tl.tensor, col: tl.tensor, inside: tl.tensor
) -> None:
    """Write uint8 [128, 128] if the row has a destination."""
    address = tl.load(desc + DESTINATION)
    if address != 0:
        destination = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
        stride = tl.multiple_of(tl.load(desc + DESTINATION_STRIDE), 16)
        tl.store(destination + row[:, None] * stride + col[None, :], codes, mask=inside)


@triton.jit
def digest_tile(
    desc: tl.tensor, codes: tl.tensor, row: tl.tensor, block_col: tl.tensor
) -> tl.tensor:
    """uint64 digest of uint8 [128, 128] whose columns outside the rectangle are 0."""
    start = block_col * BLOCK - tl.load(desc + COL_ORIGIN).to(tl.int32)
    first = (tl.load(desc + DIGEST_BASE) >> 2).to(tl.uint32) + (start >> 2).to(tl.uint32)
    pitch = (tl.load(desc + DIGEST_PITCH) >> 2).to(tl.uint32)
    line = first + row.to(tl.uint32) * pitch
    index = line[:, None] + tl.arange(0, BLOCK // 4).to(tl.uint32)[None, :]
    return total(word_terms(pack_words(codes, BLOCK, BLOCK), index))
