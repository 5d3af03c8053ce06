# ruff: noqa: SIM102 - tests for None are decided at compile time, those they enclose are not
"""One 128x128 block: amax, scale, codes, digest. Reference: reference/table."""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.descriptor import Op
from fp8sync_kernels.gpu.columns import (
    AMAX,
    AMAX_STRIDE,
    OP,
    SCALE_DIGEST_BASE,
    SCALE_DIGEST_PITCH,
    SCALE_INV,
    SCALE_STRIDE,
    SLOT,
)
from fp8sync_kernels.gpu.digest import add_digest, word_terms
from fp8sync_kernels.gpu.scale import INF_BITS, fp32_scale, pow2_scale
from fp8sync_kernels.gpu.sliced import encode_slices, examine
from fp8sync_kernels.gpu.tile import encode_tile, load_amax_bits

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
) -> None:
    """Quantize, or take the amax of, block (block_row, block_col) of one row of the table."""
    op = tl.load(desc + OP)
    slot = tl.load(desc + SLOT)
    if WIDE:
        amax_bits = load_amax_bits(desc, block_row, block_col, DTYPE)
        if nonfinite is not None:
            if amax_bits >= INF_BITS:
                count, amax_bits = examine(desc, block_row, block_col, DTYPE)
                tl.atomic_add(nonfinite + slot, count, sem="relaxed")
    else:
        count, amax_bits = examine(desc, block_row, block_col, DTYPE)
        if nonfinite is not None:
            if count != 0:
                tl.atomic_add(nonfinite + slot, count, sem="relaxed")

    amax_at = tl.load(desc + AMAX) + 4 * (block_row * tl.load(desc + AMAX_STRIDE) + block_col)
    amax_pointer = amax_at.to(tl.pointer_type(tl.int32))
    if op == OP_AMAX:
        tl.store(amax_pointer, amax_bits)
    else:
        if (op == OP_POW2_GIVEN) | (op == OP_FP32_GIVEN):
            amax_bits = tl.load(amax_pointer)
        if (op == OP_FP32) | (op == OP_FP32_GIVEN):
            multiplier, scale_inv = fp32_scale(amax_bits, LARGEST)
        else:
            multiplier, scale_inv = pow2_scale(amax_bits)
        if WIDE:
            value = encode_tile(desc, digests, block_row, block_col, multiplier, DTYPE)
        else:
            value = encode_slices(desc, block_row, block_col, multiplier, DTYPE)
        scale_at = tl.load(desc + SCALE_INV)
        if scale_at != 0:
            offset = block_row * tl.load(desc + SCALE_STRIDE) + block_col
            tl.store(scale_at.to(tl.pointer_type(tl.float32)) + offset, scale_inv)
            value += _digest_scale(desc, scale_inv, block_row, block_col)
        if digests is not None:
            add_digest(digests, slot, value)


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
        largest_bits = load_amax_bits(desc, block_row, block_col, tl.uint8)
    else:
        count, largest_bits = examine(desc, block_row, block_col, tl.uint8)
        largest_bits = tl.where(count == 0, largest_bits, INF_BITS)
    amax = largest_bits.to(tl.float32, bitcast=True) * scale_inv
    amax_bits = amax.to(tl.int32, bitcast=True)
    scale_bits = scale_inv.to(tl.int32, bitcast=True)
    ratio = tl.full([], 1.0, tl.float32)
    if (amax_bits < INF_BITS) & (scale_bits > 0) & ((scale_bits & 0x7FFFFF) == 0):
        multiplier, canonical_scale = pow2_scale(amax_bits)
        # Zeros of an extreme scale_inv would meet an infinite ratio.
        ratio = tl.where(largest_bits == 0, ratio, scale_inv * multiplier)
        scale_inv = canonical_scale
    if WIDE:
        value = encode_tile(desc, digests, block_row, block_col, ratio, tl.uint8)
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
