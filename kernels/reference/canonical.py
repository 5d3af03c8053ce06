"""The canonical form of an FP8 pair: what survives an exact power-of-two re-encoding.

vLLM's DeepGEMM path quantizes every block anew at load. Where a block's largest code is 224 or less
the new scale_inv is smaller and the codes' exponents move up: other bytes, the same values.
Quantizing by pow2 is idempotent on values, so both sides' canonical forms agree to the byte.
"""

from __future__ import annotations

import torch

from fp8sync_kernels.formulas import CODE_NAN, POW2
from fp8sync_kernels.reference.blockwise import (
    cast_e4m3,
    expand_blocks,
    partial_amax,
    scales_from_amax,
)


def canonical_pair(
    weight: torch.Tensor, scale_inv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a pair's values anew by pow2.

    That rounds nothing unless a block's scale_inv is below 2^-22, the least that pow2 makes. A block
    whose scale_inv is not a power of two (normal, positive), or whose values are not all finite, is
    left as it is, but for its NaN codes: they become 0x7F.

    Args:
        weight: float8_e4m3fn or uint8 ``[N, K]``.
        scale_inv: float32 ``[ceil(N/128), ceil(K/128)]``.

    Returns:
        uint8 codes ``[N, K]`` and float32 scale_inv of the same shapes.

    Examples:
        >>> weight, scale_inv = (
        ...     torch.full((128, 128), 8.0).to(torch.float8_e4m3fn),
        ...     torch.ones(1, 1),
        ... )
        >>> codes, scale = canonical_pair(weight, scale_inv)
        >>> (codes.view(torch.float8_e4m3fn).float() * scale)[0, 0].item(), scale.item()
        (8.0, 0.03125)
    """
    codes = weight.contiguous().view(torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float() * expand_blocks(scale_inv, codes.shape)
    amax = partial_amax(values)
    multiplier, canonical_scale = scales_from_amax(amax, POW2, torch.float32)
    bits = scale_inv.contiguous().view(torch.int32)
    keep = amax.isinf() | (bits <= 0) | ((bits & 0x7FFFFF) != 0)
    recoded = cast_e4m3(values * expand_blocks(multiplier, codes.shape)).view(torch.uint8)
    codes = torch.where(expand_blocks(keep, codes.shape), codes, recoded)
    codes = codes.masked_fill(codes & CODE_NAN == CODE_NAN, CODE_NAN)
    return codes, torch.where(keep, scale_inv, canonical_scale)
