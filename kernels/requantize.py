"""Quantizing what is already quantized: lossy, never done unasked, its error measured.

Needed where an FP8 pair is cut inside blocks. Going through fp32, the loss is nothing for aligned
pow2 pairs (if no block's amax is below 1e-4), small for misaligned pow2 pairs (values near a block's
smallest codes) and as large as a second rounding for fp32 pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fp8sync_kernels.byte_views import as_fp8
from fp8sync_kernels.reference.blockwise import dequantize_blockwise, quantize_blockwise
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


def requantize(
    pair: Pair, rows: torch.Tensor, formula: str, *, cols: tuple[int, int] | None = None
) -> Requantized:
    """Choose rows of a pair, in any order, and quantize them anew in blocks of their own.

    Args:
        pair: float8_e4m3fn (or uint8) ``[N, K]`` and its scales.
        rows: int64 ``[M]``, rows of `pair` in the order of the result.
        formula: ``"pow2"`` or ``"fp32"``.
        cols: (start, stop) of the columns to keep; None: all.

    Returns:
        The pair ``[M, stop - start]`` and the measured error.

    Raises:
        IndexError: rows that `pair` does not have.
        TypeError: `pair` is not a matrix of codes.
        ValueError: unknown formula, columns that `pair` does not have, scales that do not fit the
            weight, or values that are not finite: they would cost their blocks all other values.

    Examples:
        >>> weight, scale_inv, _ = quantize_blockwise(torch.ones(256, 384), "fp32")
        >>> result = requantize(
        ...     Pair(weight, scale_inv), torch.arange(64, 192), "fp32", cols=(0, 192)
        ... )
        >>> tuple(result.pair.weight.shape), tuple(result.pair.scale_inv.shape)
        ((128, 192), (1, 2))
    """
    weight, scale_inv = pair
    values = dequantize_blockwise(as_fp8(weight), scale_inv, torch.float32)
    start, stop = cols or (0, values.shape[1])
    if not 0 <= start <= stop <= values.shape[1]:
        raise ValueError(f"columns [{start}, {stop}) of {values.shape[1]}")
    values = values.index_select(0, rows)[:, start:stop]
    again, scale_inv, nonfinite = quantize_blockwise(values, formula)
    if nonfinite:
        raise ValueError(f"{int(nonfinite)} values of {values.numel()} are not finite")
    if not values.numel():
        return Requantized(Pair(again, scale_inv), 0.0, 0.0, 0.0)
    error = dequantize_blockwise(again, scale_inv, torch.float32).double() - values.double()
    size = values.double().norm().item()
    return Requantized(
        Pair(again, scale_inv),
        changed=(error != 0).double().mean().item(),
        relative_rms_error=error.norm().item() / size if size else 0.0,
        max_error=error.abs().max().item(),
    )
