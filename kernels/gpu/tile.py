"""A whole 128x128 block in registers as 32-bit words, with 16-byte accesses: the fast way.

What is between the load and the store decides how many blocks a multiprocessor can have in flight,
and that decides the bandwidth. So no branch encloses tile-wide work here (stores are masked
instead), positions within a block are of 32 bits, and blocks that are cut off by the end of their
rectangle (CUT) are masked only in tables that have such.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.gpu.cast import INTERPRETED
from fp8sync_kernels.gpu.columns import (
    COL_ORIGIN,
    COLS,
    DESTINATION,
    DESTINATION_STRIDE,
    ROW_ORIGIN,
    ROWS,
    SOURCE,
    SOURCE_STRIDE,
)
from fp8sync_kernels.gpu.digest import KEY_STEP, key_of_step, total
from fp8sync_kernels.gpu.scale import INF_BITS, MAGNITUDE_MASK

BLOCK = tl.constexpr(128)


@triton.jit
def load_tile(
    desc: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
    DTYPE: tl.constexpr,
    CUT: tl.constexpr,
    LAST: tl.constexpr,
) -> tl.tensor:
    """The elements' bits as uint32 [128, 32], [128, 32, 2] or [128, 32, 2, 2] by the size of DTYPE.

    A thread has 16 codes to write, so it reads 16 elements of a row: one, two or four chunks of
    16 bytes. The trailing dims count chunks. 0 outside the rectangle. LAST: what was loaded before is
    also asked for before; else the compiler may want it only once the tile is there.
    """
    CHUNKS: tl.constexpr = DTYPE.primitive_bitwidth // 8
    first_row, first_col = _first(desc, block_row, block_col, CUT)
    stride = tl.load(desc + SOURCE_STRIDE) * CHUNKS // 4
    first = tl.load(desc + SOURCE).to(tl.pointer_type(tl.uint32))
    first = tl.multiple_of(first + (first_row * stride + first_col * CHUNKS // 4), 16)
    word = tl.arange(0, 32)
    line = tl.arange(0, BLOCK) * tl.multiple_of(stride.to(tl.int32), 4)
    pointers = first + (line[:, None] + (word // 4 * (4 * CHUNKS) + word % 4)[None, :])
    inside = None
    if CUT:
        inside = _inside(desc, first_row, first_col)
    if LAST:
        tl.debug_barrier()
    tile = _load(pointers, inside)
    if CHUNKS > 1:
        tile = tl.join(tile, _load(pointers + 4, inside))
    if CHUNKS > 2:
        later = tl.join(_load(pointers + 8, inside), _load(pointers + 12, inside))
        tile = tl.permute(tl.join(tile, later), 0, 1, 3, 2)
    return tile


@triton.jit
def _load(pointers: tl.tensor, inside: tl.tensor) -> tl.tensor:
    if inside is None:  # noqa: SIM108 - decided at compile time
        words = tl.load(pointers)
    else:
        words = tl.load(pointers, mask=inside, other=0)
    return words


@triton.jit
def _inside(desc: tl.tensor, first_row: tl.tensor, first_col: tl.tensor) -> tl.tensor:
    """Which of a block's 4-code words [128, 32] lie in the rectangle."""
    row = first_row + tl.arange(0, BLOCK)
    word = (first_col >> 2) + tl.arange(0, 32)
    words = tl.multiple_of(tl.load(desc + COLS).to(tl.int32) >> 2, 4)
    row_inside = (row >= 0) & (row < tl.load(desc + ROWS).to(tl.int32))
    return row_inside[:, None] & ((word >= 0) & (word < words))[None, :]


@triton.jit
def store_codes(
    desc: tl.tensor,
    codes: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
    wanted: tl.tensor,
    CUT: tl.constexpr,
) -> None:
    """Write uint32 [128, 32] of codes, if wanted."""
    first_row, first_col = _first(desc, block_row, block_col, CUT)
    stride = tl.load(desc + DESTINATION_STRIDE) >> 2
    first = tl.load(desc + DESTINATION).to(tl.pointer_type(tl.uint32))
    first = tl.multiple_of(first + (first_row * stride + (first_col >> 2)), 16)
    line = tl.arange(0, BLOCK) * tl.multiple_of(stride.to(tl.int32), 4)
    word = tl.arange(0, BLOCK // 4)
    mask = tl.broadcast_to(wanted.to(tl.int32), [BLOCK, BLOCK // 4]) != 0
    if CUT:
        mask &= _inside(desc, first_row, first_col)
    tl.store(first + (line[:, None] + word[None, :]), codes, mask=mask)


@triton.jit
def digest_codes(
    desc: tl.tensor,
    first_word: tl.tensor,
    pitch: tl.tensor,
    codes: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
    CUT: tl.constexpr,
) -> tl.tensor:
    """uint64 digest of uint32 [128, 32] of codes, which are 0 outside the rectangle.

    first_word, pitch: the row's DIGEST_BASE and DIGEST_PITCH in words, uint32.
    """
    first_row, first_col = _first(desc, block_row, block_col, CUT)
    first = first_word + first_row.to(tl.uint32) * pitch + (first_col >> 2).to(tl.uint32)
    line = (first + 1) * KEY_STEP + tl.arange(0, BLOCK).to(tl.uint32) * (pitch * KEY_STEP)
    step = line[:, None] + (tl.arange(0, BLOCK // 4).to(tl.uint32) * KEY_STEP)[None, :]
    return total(codes.to(tl.uint64) * key_of_step(step).to(tl.uint64))


@triton.jit
def tile_amax_bits(words: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Largest magnitude of a tile as fp32 bits; infinity if anything in it is not finite."""
    if DTYPE.primitive_bitwidth == 32:
        bits = tl.max((words & MAGNITUDE_MASK).to(tl.int32))
    else:
        if DTYPE.primitive_bitwidth == 16:
            own = _largest_held(words & 0x7FFF7FFF, 8)
        else:
            # Shifted so that a magnitude leads each half; which byte follows it does not matter.
            own = _larger_halves(_largest_held(words << 1, 16), _largest_held(words << 9, 16))
        largest = tl.max(tl.maximum(own & 0xFFFF, own >> 16).to(tl.int32))
        if DTYPE.primitive_bitwidth == 16:
            widened = largest.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        else:
            widened = (largest >> 9).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        bits = widened.to(tl.int32, bitcast=True)
    return tl.minimum(bits, INF_BITS)


@triton.jit
def _largest_held(pairs: tl.tensor, LINES: tl.constexpr) -> tl.tensor:
    """The largest upper and lower halves that a thread holds of uint32 [128, 32] or [128, 32, 2].

    LINES: rows in which it holds four words or, of 16-bit elements, eight. What others hold stays apart.
    """
    if not INTERPRETED:
        if len(pairs.shape) == 3:
            pairs = tl.reduce(pairs, 2, _larger_halves)
        held = tl.reduce(tl.reshape(pairs, [LINES, BLOCK // LINES, 8, 4]), 0, _larger_halves)
        pairs = tl.reduce(held, 2, _larger_halves)
    return pairs


@triton.jit
def _larger_halves(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    """The larger of each 16 bits of two uint32."""
    if INTERPRETED:
        high = tl.maximum(one >> 16, other >> 16)
        larger = (high << 16) | tl.maximum(one & 0xFFFF, other & 0xFFFF)
    else:
        larger = tl.inline_asm_elementwise(
            "max.u16x2 $0, $1, $2;", "=r,r,r", [one, other], tl.uint32, is_pure=True, pack=1
        )
    return larger


@triton.jit
def smaller_halves(pairs: tl.tensor, BOUND: tl.constexpr) -> tl.tensor:
    """The smaller of each 16 bits of uint32 and of a constant."""
    if INTERPRETED:
        high = tl.minimum(pairs >> 16, BOUND >> 16)
        smaller = (high << 16) | tl.minimum(pairs & 0xFFFF, BOUND & 0xFFFF)
    else:
        bound = tl.full(pairs.shape, BOUND, tl.uint32)
        smaller = tl.inline_asm_elementwise(
            "min.u16x2 $0, $1, $2;", "=r,r,r", [pairs, bound], tl.uint32, is_pure=True, pack=1
        )
    return smaller


@triton.jit
def _first(
    desc: tl.tensor, block_row: tl.tensor, block_col: tl.tensor, CUT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The block's first row and column, counted from the rectangle's."""
    row = block_row * BLOCK
    col = block_col * BLOCK
    if CUT:
        row -= tl.load(desc + ROW_ORIGIN).to(tl.int32)
        col -= tl.multiple_of(tl.load(desc + COL_ORIGIN).to(tl.int32), 16)
    return row, col
