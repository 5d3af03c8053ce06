"""A whole 128x128 block in registers, with 16-byte accesses: the fast way.

What is between the load and the store decides how many blocks a multiprocessor can have in flight,
and that decides the bandwidth. So no branch encloses tile-wide work here (stores are masked
instead), and 16-bit sources are widened only on their way into the cast.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.gpu.columns import (
    COL_ORIGIN,
    COLS,
    DESTINATION,
    DESTINATION_STRIDE,
    DIGEST_PITCH,
    ROW_ORIGIN,
    ROWS,
    SOURCE,
    SOURCE_STRIDE,
)
from fp8sync_kernels.gpu.digest import total, word_terms
from fp8sync_kernels.gpu.scale import INF_BITS, MAGNITUDE_MASK

BLOCK = tl.constexpr(128)


@triton.jit
def load_tile(
    desc: tl.tensor, block_row: tl.tensor, block_col: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """[128, 128] of DTYPE, 0 outside the rectangle."""
    source = tl.multiple_of(tl.load(desc + SOURCE).to(tl.pointer_type(DTYPE)), 16)
    stride = tl.multiple_of(tl.load(desc + SOURCE_STRIDE), 128 // DTYPE.primitive_bitwidth)
    cols = tl.multiple_of(tl.load(desc + COLS).to(tl.int32), 16)
    row = block_row * BLOCK - tl.load(desc + ROW_ORIGIN).to(tl.int32) + tl.arange(0, BLOCK)
    col = _first_col(desc, block_col) + tl.arange(0, BLOCK)
    row_inside = (row >= 0) & (row < tl.load(desc + ROWS).to(tl.int32))
    inside = row_inside[:, None] & ((col >= 0) & (col < cols))[None, :]
    return tl.load(source + row[:, None] * stride + col[None, :], mask=inside, other=0)


@triton.jit
def store_words(
    desc: tl.tensor,
    words: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
    wanted: tl.tensor,
) -> None:
    """Write uint32 [128, 32] of codes, if wanted.

    In 8-byte pieces: wider ones would make the compiler move the tile through shared memory.
    """
    address = tl.load(desc + DESTINATION)
    destination = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 8)
    stride = tl.multiple_of(tl.load(desc + DESTINATION_STRIDE) >> 2, 4)
    cols = tl.multiple_of(tl.load(desc + COLS).to(tl.int32) >> 2, 4)
    row = block_row * BLOCK - tl.load(desc + ROW_ORIGIN).to(tl.int32) + tl.arange(0, BLOCK)
    col = (_first_col(desc, block_col) >> 2) + tl.arange(0, BLOCK // 4)
    end = tl.where(wanted, tl.load(desc + ROWS).to(tl.int32), 0)
    row_inside = (row >= 0) & (row < end)
    inside = row_inside[:, None] & ((col >= 0) & (col < cols))[None, :]
    tl.store(destination + row[:, None] * stride + col[None, :], words, mask=inside)


@triton.jit
def digest_words(
    desc: tl.tensor,
    first_word: tl.tensor,
    words: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
) -> tl.tensor:
    """uint64 digest of uint32 [128, 32] of codes, which are 0 outside the rectangle.

    first_word: the row's DIGEST_BASE in words, uint32.
    """
    pitch = (tl.load(desc + DIGEST_PITCH) >> 2).to(tl.uint32)
    row = block_row * BLOCK - tl.load(desc + ROW_ORIGIN).to(tl.int32) + tl.arange(0, BLOCK)
    first = first_word + (_first_col(desc, block_col) >> 2).to(tl.uint32)
    line = first + row.to(tl.uint32) * pitch
    index = line[:, None] + tl.arange(0, BLOCK // 4).to(tl.uint32)[None, :]
    return total(word_terms(words, index))


@triton.jit
def tile_amax_bits(values: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Largest magnitude of a tile as fp32 bits; infinity if anything in it is not finite.

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
    return tl.minimum(bits, INF_BITS)


@triton.jit
def _first_col(desc: tl.tensor, block_col: tl.tensor) -> tl.tensor:
    """The block's first column, counted from the rectangle's."""
    origin = tl.multiple_of(tl.load(desc + COL_ORIGIN).to(tl.int32), 16)
    return block_col * BLOCK - origin
