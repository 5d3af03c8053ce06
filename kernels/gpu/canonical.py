"""Digest of an FP8 pair in its canonical form. Reference: reference/canonical.

A byte is all there is to read, so a few instructions for each are all there is time for. Where the
canonical scale_inv is 2^k times smaller, codes are doubled k times, four in a word, as integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.gpu.columns import DIGEST_BASE, DIGEST_PITCH, SCALE_INV, SCALE_STRIDE, SLOT
from fp8sync_kernels.gpu.digest import add_digest, scale_digest_word, word_terms
from fp8sync_kernels.gpu.prefetch import prefetch_rows
from fp8sync_kernels.gpu.scale import INF_BITS, pow2_multiplier, pow2_scale_inv
from fp8sync_kernels.gpu.sliced import encode_slices, sliced_amax_bits
from fp8sync_kernels.gpu.tile import BLOCK, digest_codes, load_tile, smaller_halves, tile_amax_bits


@triton.jit
def canonical_block(
    desc: tl.tensor,
    later: tl.tuple,
    block_row: tl.tensor,
    block_col: tl.tensor,
    digests: tl.tensor,
    WIDE: tl.constexpr,
    CUT: tl.constexpr,
) -> None:
    """Digest one block of FP8 codes and its scale_inv as pow2 would write their values.

    Blocks whose scale_inv is no power of two, or whose values are not all finite, are their own
    canonical form.
    """
    first_word = (tl.load(desc + DIGEST_BASE) >> 2).to(tl.uint32)
    offset = block_row * tl.load(desc + SCALE_STRIDE) + block_col
    scale_inv = tl.load(tl.load(desc + SCALE_INV).to(tl.pointer_type(tl.float32)) + offset)
    if WIDE:
        codes = load_tile(desc, block_row, block_col, tl.uint8, CUT, True)
        prefetch_rows(later)
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
    # What rounds (below amax 1e-4) or holds NaN, which may be negative, goes the slow way.
    slow = (ratio < 1.0) | (largest_bits >= INF_BITS)
    slot = tl.load(desc + SLOT)
    scale_word = scale_digest_word(desc, block_row, block_col)
    value = tl.full([], 0, tl.uint64)
    if WIDE:
        doublings = (ratio.to(tl.int32, bitcast=True) >> 23) - 127
        while doublings > 0:
            codes = _doubled(codes)
            doublings -= 1
        codes = tl.reshape(codes, [BLOCK, BLOCK // 4])
        pitch = (tl.load(desc + DIGEST_PITCH) >> 2).to(tl.uint32)
        value = digest_codes(desc, first_word, pitch, codes, block_row, block_col, CUT)
    if slow or not WIDE:
        value = encode_slices(desc, block_row, block_col, ratio, tl.uint8)
    value += word_terms(scale_inv.to(tl.uint32, bitcast=True), scale_word)
    add_digest(digests, slot, value)


@triton.jit
def _doubled(codes: tl.tensor) -> tl.tensor:
    """Twice the value of each of four codes, none of which exceeds 224 in magnitude.

    With c the code without its sign, that is c + min(c, 8): an exponent more from 8 on; below, where
    values are multiples of 2^-9 by c, c + c.
    """
    even = smaller_halves(codes & 0x007F007F, 0x00080008)
    odd = smaller_halves(codes & 0x7F007F00, 0x08000800)
    return codes + even + odd
