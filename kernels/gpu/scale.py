"""The two formulas on one block's amax, in Triton. Reference: reference/blockwise.scales_from_amax.

A block's amax travels as the int32 bits of a non-negative float, which order as the floats do.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF_BITS = tl.constexpr(0x7F800000)
MAGNITUDE_MASK = tl.constexpr(0x7FFFFFFF)
_FLOOR_BITS = tl.constexpr(0x38D1B717)  # 1e-4 rounded to fp32
_MANTISSA_OF_448 = tl.constexpr(0x600000)  # 448 = 1.75 * 2^8


@triton.jit
def pow2_exponent(amax_bits: tl.tensor) -> tl.tensor:
    """Biased exponent of scale_inv, the least power of two that fits amax into 448."""
    bits = tl.maximum(amax_bits, _FLOOR_BITS)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > _MANTISSA_OF_448).to(tl.int32)
    return tl.where(amax_bits >= INF_BITS, 127, exponent)


@triton.jit
def pow2_multiplier(amax_bits: tl.tensor) -> tl.tensor:
    """1 / scale_inv of the pow2 formula, exactly."""
    return ((254 - pow2_exponent(amax_bits)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def pow2_scale_inv(amax_bits: tl.tensor) -> tl.tensor:
    """scale_inv of the pow2 formula."""
    return (pow2_exponent(amax_bits) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fp32_multiplier(amax_bits: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    """448 / amax with the fp32 formula's exceptions. LARGEST: finite, of the source dtype."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full([], 448.0, tl.float32), amax)
    scale = tl.where(scale == float("inf"), LARGEST, scale)
    return tl.where((amax_bits == 0) | (amax_bits >= INF_BITS), 1.0, scale)


@triton.jit
def fp32_scale_inv(multiplier: tl.tensor) -> tl.tensor:
    """scale_inv of the fp32 formula."""
    return tl.div_rn(tl.full([], 1.0, tl.float32), multiplier)
