"""Quantizing what is already quantized: lossy, never done unasked, its error measured.

Needed where an FP8 pair is cut inside blocks. Going through fp32, the loss is nothing for aligned
pow2 pairs, small for misaligned pow2 pairs (values near a block's smallest codes) and as large as a
second rounding for fp32 pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fp8sync_kernels.reference.blockwise import (
    dequantize_blockwise,
    quantize_blockwise,
)
from fp8sync_kernels.split import Pair


class Requantized(NamedTuple):
    """A pair in a new block grid, and what that cost.

    Attributes:
        pair: the new weight and scale_inv.
        changed: fraction of elements whose value is not what it was.
        relative_rms_error: root of the mean squared change over that of the values.
        max_error: largest absolute change.

    Examples:
        >>> weight, scale_inv, _ = quantize_blockwise(torch.ones(256, 128), "pow2")
        >>> requantize(Pair(weight, scale_inv), torch.arange(64, 192), "pow2").changed
        0.0
    """

    pair: Pair
    changed: float
    relative_rms_error: float
    max_error: float


def requantize(pair: Pair, rows: torch.Tensor, formula: str, *, first_col: int = 0) -> Requantized:
    """Choose rows of a pair, in any order, and quantize them anew in blocks of their own.

    Args:
        pair: float8_e4m3fn ``[N, K]`` and its scales.
        rows: int64 ``[M]``, rows of `pair` in the order of the result.
        formula: ``"pow2"`` or ``"fp32"``.
        first_col: columns before this one are dropped.

    Returns:
        The pair ``[M, K - first_col]`` and the measured error.

    Raises:
        ValueError: unknown formula, or scales that do not fit the weight.

    Examples:
        >>> weight, scale_inv, _ = quantize_blockwise(torch.ones(256, 128), "fp32")
        >>> result = requantize(Pair(weight, scale_inv), torch.arange(64, 192), "fp32")
        >>> tuple(result.pair.weight.shape), tuple(result.pair.scale_inv.shape)
        ((128, 128), (1, 1))
    """
    weight, scale_inv = pair
    values = dequantize_blockwise(weight.view(torch.float8_e4m3fn), scale_inv, torch.float32)
    values = values.index_select(0, rows)[:, first_col:]
    weight, scale_inv, _ = quantize_blockwise(values, formula)
    again = dequantize_blockwise(weight, scale_inv, torch.float32)
    error = (again.double() - values.double()).abs()
    size = values.double().square().mean().sqrt().item()
    rms = error.square().mean().sqrt().item()
    return Requantized(
        Pair(weight, scale_inv),
        changed=(again != values).double().mean().item(),
        relative_rms_error=rms / size if size else 0.0,
        max_error=error.max().item() if error.numel() else 0.0,
    )
