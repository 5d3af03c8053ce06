"""Blockwise E4M3 quantization in PyTorch: what the kernels must reproduce byte for byte.

Every step is one IEEE operation on tensors, on the CPU and on CUDA alike. In particular nothing
divides a tensor by a Python number: CUDA PyTorch multiplies by the rounded reciprocal instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fp8sync_kernels.formulas import (
    BLOCK,
    CODE_NAN,
    E4M3_MAX,
    FP32,
    POW2_AMAX_FLOOR,
    check_formula,
)

SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Quantized(NamedTuple):
    """A quantized matrix.

    Attributes:
        weight: float8_e4m3fn ``[N, K]``, contiguous.
        scale_inv: float32 ``[ceil(N/128), ceil(K/128)]``; value = weight * scale_inv.
        nonfinite: int64 scalar tensor, the number of NaN and infinite elements of the source.

    Examples:
        >>> weight, scale_inv, nonfinite = quantize_blockwise(torch.ones(256, 200), "pow2")
        >>> weight.dtype, tuple(scale_inv.shape), int(nonfinite)
        (torch.float8_e4m3fn, (2, 2), 0)
    """

    weight: torch.Tensor
    scale_inv: torch.Tensor
    nonfinite: torch.Tensor


def quantize_blockwise(
    x: torch.Tensor,
    formula: str,
    *,
    amax: torch.Tensor | None = None,
    origin: tuple[int, int] = (0, 0),
) -> Quantized:
    """Quantize a matrix in 128x128 blocks; both formulas are defined in `fp8sync_kernels.formulas`.

    Args:
        x: bf16, fp16 or fp32 ``[N, K]``, any strides. Ragged edges are allowed.
        formula: ``"pow2"`` or ``"fp32"``.
        amax: float32 per block, to be used instead of the maximum of `x`: for blocks of which `x`
            holds only a part. Shape as `scale_inv`.
        origin: position of ``x[0, 0]`` within the first block, each 0..127. (0, 0) anchors the
            block grid at x's own origin.

    Returns:
        Quantized; with an origin, scale_inv is ``[ceil((r+N)/128), ceil((c+K)/128)]``.

    Raises:
        TypeError: `x` is not a 2-D bf16, fp16 or fp32 tensor.
        ValueError: unknown formula, an origin outside a block, or a wrong shape of `amax`.

    Examples:
        >>> quantize_blockwise(torch.full((128, 128), 3.0), "pow2").scale_inv
        tensor([[0.0078]])
        >>> quantize_blockwise(torch.full((128, 128), 7.0), "fp32").scale_inv * 448
        tensor([[7.]])
    """
    check_formula(formula)
    if amax is None:
        amax = partial_amax(x, origin=origin)
    elif tuple(amax.shape) != grid_shape(x, origin):
        raise ValueError(f"amax has shape {tuple(amax.shape)}, expected {grid_shape(x, origin)}")
    multiplier, scale_inv = scales_from_amax(amax, formula, x.dtype)
    scaled = x.float() * expand_blocks(multiplier, x.shape, origin)
    codes = cast_e4m3(scaled)
    return Quantized(codes, scale_inv, count_nonfinite(x))


def dequantize_blockwise(
    weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply codes by their block's scale_inv in fp32 and round once to `dtype`.

    Args:
        weight: float8_e4m3fn ``[N, K]``.
        scale_inv: float32 ``[ceil(N/128), ceil(K/128)]``.
        dtype: of the result.

    Returns:
        ``[N, K]`` of that dtype.

    Raises:
        TypeError: `weight` is not 2-D, or of another dtype.
        ValueError: `scale_inv` does not have the shape that `weight` asks for.

    Examples:
        >>> weight, scale_inv, _ = quantize_blockwise(torch.full((128, 128), 3.0), "pow2")
        >>> dequantize_blockwise(weight, scale_inv, torch.bfloat16)[0, 0].item()
        3.0
    """
    grid = grid_shape(weight, (0, 0), (torch.float8_e4m3fn,))
    if tuple(scale_inv.shape) != grid:
        raise ValueError(
            f"scale_inv has shape {tuple(scale_inv.shape)}, weight {tuple(weight.shape)} needs {grid}"
        )
    return (weight.float() * expand_blocks(scale_inv, weight.shape)).to(dtype)


def partial_amax(x: torch.Tensor, *, origin: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """Largest magnitude of each block (float32), infinite where anything in it is not finite.

    Blocks cut between holders are joined by the element-wise maximum of their results.

    Args:
        x: bf16, fp16 or fp32 ``[N, K]``, any strides.
        origin: position of ``x[0, 0]`` within the first block, each 0..127.

    Returns:
        float32 ``[ceil((r+N)/128), ceil((c+K)/128)]`` for an origin (r, c).

    Raises:
        TypeError: `x` is not a 2-D bf16, fp16 or fp32 tensor.
        ValueError: an origin outside a block.

    Examples:
        >>> upper, lower = torch.full((86, 128), 3.0), torch.full((42, 128), -5.0)
        >>> amax = torch.maximum(partial_amax(upper), partial_amax(lower, origin=(86, 0)))
        >>> quantize_blockwise(upper, "pow2", amax=amax).scale_inv
        tensor([[0.0156]])
    """
    rows, cols = grid_shape(x, origin)
    magnitude = x.float().abs()
    magnitude = magnitude.masked_fill(magnitude.isnan(), float("inf"))
    padded = magnitude.new_zeros(rows * BLOCK, cols * BLOCK)
    padded[origin[0] : origin[0] + x.shape[0], origin[1] : origin[1] + x.shape[1]] = magnitude
    return padded.view(rows, BLOCK, cols, BLOCK).amax(dim=(1, 3))


def scales_from_amax(
    amax: torch.Tensor, formula: str, source_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(multiplier, scale_inv), both float32 and shaped as `amax`, by `formula`.

    `source_dtype` matters to ``fp32`` only, and only below amax = 1.4e-36 (see formulas).
    """
    one = torch.ones_like(amax)
    if check_formula(formula) == FP32:
        scale = torch.full_like(amax, E4M3_MAX) / amax
        largest = torch.full_like(amax, torch.finfo(source_dtype).max)
        scale = torch.where(scale.isinf(), largest, scale)
        scale = torch.where((amax == 0) | ~amax.isfinite(), one, scale)
        return scale, one / scale
    bits = torch.clamp(amax, min=POW2_AMAX_FLOOR).contiguous().view(torch.int32)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()
    exponent = torch.where(amax.isfinite(), exponent, torch.full_like(exponent, 127))
    return ((254 - exponent) << 23).view(torch.float32), (exponent << 23).view(torch.float32)


def cast_e4m3(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> float8_e4m3fn: nearest even, saturating, every NaN to 0x7F (as the hardware's cast).

    Older PyTorch neither saturates nor drops a NaN's sign, hence the clamp and the fill.
    """
    codes = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).contiguous()
    return codes.view(torch.uint8).masked_fill(x.isnan(), CODE_NAN).view(torch.float8_e4m3fn)


def count_nonfinite(x: torch.Tensor) -> torch.Tensor:
    """Number of NaN and infinite elements, an int64 scalar tensor on x's device."""
    return (~x.isfinite()).sum()


def grid_shape(
    x: torch.Tensor, origin: tuple[int, int], dtypes: tuple[torch.dtype, ...] = SOURCE_DTYPES
) -> tuple[int, int]:
    """Blocks that the rectangle `x` touches when it starts at `origin` of a block."""
    if x.dim() != 2 or x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"expected a 2-D tensor of {names}, got {x.dim()}-D {x.dtype}")
    if not all(0 <= start < BLOCK for start in origin):
        raise ValueError(f"origin {origin} lies outside a {BLOCK}x{BLOCK} block")
    rows, cols = (-(-(start + n) // BLOCK) for start, n in zip(origin, x.shape, strict=True))
    return rows, cols


def expand_blocks(
    per_block: torch.Tensor, shape: torch.Size, origin: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """Repeat per-block values over their elements: ``[gr, gc]`` -> `shape`."""
    full = per_block.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return full[origin[0] : origin[0] + shape[0], origin[1] : origin[1] + shape[1]]
