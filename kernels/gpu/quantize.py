# ruff: noqa: C901, SIM102 - tests for None are decided at compile time, those they enclose are not
"""One 128x128 block: amax, scale, codes, digest. Reference: reference/table."""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.descriptor import Op
from fp8sync_kernels.gpu.cast import encode_words
from fp8sync_kernels.gpu.columns import (
    AMAX,
    AMAX_STRIDE,
    DESTINATION,
    DIGEST_BASE,
    OP,
    SCALE_DIGEST_BASE,
    SCALE_DIGEST_PITCH,
    SCALE_INV,
    SCALE_STRIDE,
    SLOT,
)
from fp8sync_kernels.gpu.digest import add_digest, word_terms
from fp8sync_kernels.gpu.scale import (
    INF_BITS,
    fp32_multiplier,
    fp32_scale_inv,
    pow2_multiplier,
    pow2_scale_inv,
)
from fp8sync_kernels.gpu.sliced import encode_slices, sliced_amax_bits, sliced_nonfinite
from fp8sync_kernels.gpu.tile import (
    BLOCK,
    digest_words,
    load_tile,
    store_words,
    tile_amax_bits,
)

OP_FP32 = tl.constexpr(int(Op.FP32))
OP_POW2_GIVEN = tl.constexpr(int(Op.POW2_GIVEN))
OP_FP32_GIVEN = tl.constexpr(int(Op.FP32_GIVEN))
OP_AMAX = tl.constexpr(int(Op.AMAX))


@triton.jit
def quantize_block(
    desc: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
    digests: tl.tensor,
    nonfinite: tl.tensor,
    DTYPE: tl.constexpr,
    LARGEST: tl.constexpr,
    WIDE: tl.constexpr,
    DIVIDES: tl.constexpr,
) -> None:
    """Quantize, or take the amax of, block (block_row, block_col) of one row of the table.

    Whatever can wait until the tile has left the registers comes after it: the second division,
    scales, counting. Before, it would take the registers that a further program could live in.
    """
    # Wanted later; their sectors' latency passes while the tile is read.
    op = tl.load(desc + OP).to(tl.int32)
    first_word = (tl.load(desc + DIGEST_BASE) >> 2).to(tl.uint32)
    stored = op != OP_AMAX
    if not DIVIDES:
        stored &= tl.load(desc + DESTINATION) != 0
    if WIDE:
        values = load_tile(desc, block_row, block_col, DTYPE)
        own_amax_bits = tile_amax_bits(values, DTYPE)
    else:
        own_amax_bits = sliced_amax_bits(desc, block_row, block_col, DTYPE)

    given = (op == OP_POW2_GIVEN) | (op == OP_FP32_GIVEN)
    outside = given | (op == OP_AMAX)
    amax_stride = tl.load(desc + AMAX_STRIDE, mask=outside, other=0)
    amax_pointer = tl.load(desc + AMAX, mask=outside, other=0).to(tl.pointer_type(tl.int32))
    amax_pointer += block_row * amax_stride + block_col
    by_fp32 = (op == OP_FP32) | (op == OP_FP32_GIVEN)
    amax_bits = tl.where(given, tl.load(amax_pointer, mask=given, other=0), own_amax_bits)
    multiplier = pow2_multiplier(amax_bits)
    if DIVIDES:
        if by_fp32:
            multiplier = fp32_multiplier(amax_bits, LARGEST)

    value = tl.full([], 0, tl.uint64)
    if WIDE:
        words = encode_words(values.to(tl.float32) * multiplier, BLOCK, BLOCK)
        if DIVIDES:  # not before, for lack of a register
            stored &= tl.load(desc + DESTINATION) != 0
        store_words(desc, words, block_row, block_col, stored)
        if digests is not None:
            value = digest_words(desc, first_word, words, block_row, block_col)
    else:
        if op != OP_AMAX:
            value = encode_slices(desc, block_row, block_col, multiplier, DTYPE)

    slot = tl.load(desc + SLOT)
    if op == OP_AMAX:
        tl.store(amax_pointer, amax_bits)
    else:
        scale_inv = pow2_scale_inv(amax_bits)
        if DIVIDES:
            if by_fp32:
                scale_inv = fp32_scale_inv(multiplier)
        scale_at = tl.load(desc + SCALE_INV)
        if scale_at != 0:
            offset = block_row * tl.load(desc + SCALE_STRIDE) + block_col
            tl.store(scale_at.to(tl.pointer_type(tl.float32)) + offset, scale_inv)
            value += _digest_scale(desc, scale_inv, block_row, block_col)
        if digests is not None:
            add_digest(digests, slot, value)
    if nonfinite is not None:
        if own_amax_bits >= INF_BITS:
            count = sliced_nonfinite(desc, block_row, block_col, DTYPE)
            tl.atomic_add(nonfinite + slot, count, sem="relaxed")


@triton.jit
def canonical_block(
    desc: tl.tensor,
    block_row: tl.tensor,
    block_col: tl.tensor,
    digests: tl.tensor,
    WIDE: tl.constexpr,
) -> None:
    """Digest one block of FP8 codes and its scale_inv as pow2 would write their values.

    Blocks whose scale_inv is no power of two, or whose values are not all finite, are their own
    canonical form.
    """
    offset = block_row * tl.load(desc + SCALE_STRIDE) + block_col
    scale_inv = tl.load(tl.load(desc + SCALE_INV).to(tl.pointer_type(tl.float32)) + offset)
    if WIDE:
        codes = load_tile(desc, block_row, block_col, tl.uint8)
        largest_bits = tile_amax_bits(codes, tl.uint8)
    else:
        largest_bits = sliced_amax_bits(desc, block_row, block_col, tl.uint8)
    amax = largest_bits.to(tl.float32, bitcast=True) * scale_inv
    amax_bits = amax.to(tl.int32, bitcast=True)
    scale_bits = scale_inv.to(tl.int32, bitcast=True)
    ratio = tl.full([], 1.0, tl.float32)
    if (amax_bits < INF_BITS) & (scale_bits > 0) & ((scale_bits & 0x7FFFFF) == 0):
        # Zeros of an extreme scale_inv would meet an infinite ratio.
        ratio = tl.where(largest_bits == 0, ratio, scale_inv * pow2_multiplier(amax_bits))
        scale_inv = pow2_scale_inv(amax_bits)
    if WIDE:
        x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        words = encode_words(x * ratio, BLOCK, BLOCK)
        first_word = (tl.load(desc + DIGEST_BASE) >> 2).to(tl.uint32)
        value = digest_words(desc, first_word, words, block_row, block_col)
    else:
        value = encode_slices(desc, block_row, block_col, ratio, tl.uint8)
    value += _digest_scale(desc, scale_inv, block_row, block_col)
    add_digest(digests, tl.load(desc + SLOT), value)


@triton.jit
def _digest_scale(
    desc: tl.tensor, scale_inv: tl.tensor, block_row: tl.tensor, block_col: tl.tensor
) -> tl.tensor:
    pitch = tl.load(desc + SCALE_DIGEST_PITCH)
    position = tl.load(desc + SCALE_DIGEST_BASE) + block_row * pitch + block_col * 4
    return word_terms(scale_inv.to(tl.uint32, bitcast=True), (position >> 2).to(tl.uint32))
