"""Transformer Engine's FP8 parameters without a GPU: what they tell of themselves, on CPU buffers.

The source asks a parameter for `get_metadata()` and nothing else, as Megatron-Bridge's own FP8 export
does. Here the buffers are filled by the reference formula, with NaN where Transformer Engine pads.
"""

from __future__ import annotations

import re
from enum import IntEnum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.recipe import Formula
from fp8sync_kernels import quantize_blockwise

if TYPE_CHECKING:
    from collections.abc import Iterator


class DType(IntEnum):
    """Transformer Engine's, whose text is its number."""

    kFloat8E4M3 = 7
    kFloat8E5M2 = 8


LINEAR = re.compile(r"linear_(qkv|fc1|fc2|\w+_proj)\.weight$")
"""Attention's output projection stays BF16, so that models are mixed."""


def quantize_in_place(chunks: list, formula: Formula) -> None:
    """Turn the linear weights into FP8 parameters, all but those of one kind."""
    for _, parameter in linear_weights(chunks):
        make_pair(parameter, formula)


def linear_weights(chunks: list) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the weights that are FP8 here."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if LINEAR.search(name):
                yield name, parameter


def make_pair(parameter: Any, formula: Formula, **changes: Any) -> None:
    """Let a parameter say that it is a blockwise FP8 tensor; `changes` go into its metadata."""
    codes, scale_inv = buffers(parameter.detach(), formula)
    metadata = {
        "rowwise_data": codes,
        "rowwise_scale_inv": scale_inv,
        "columnwise_data": None,
        "columnwise_scale_inv": None,
        "fp8_dtype": DType.kFloat8E4M3,
        "is_2D_scaled": True,
        "quantizer": SimpleNamespace(block_len=128, force_pow_2_scales=formula is Formula.POW2),
    }
    parameter.metadata = {**metadata, **changes}
    parameter.get_metadata = lambda: parameter.metadata


def buffers(x: torch.Tensor, formula: Formula) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes as uint8, and scales with columns padded to a multiple of four."""
    quantized = quantize_blockwise(x, formula.value)
    rows, cols = quantized.scale_inv.shape
    padded = torch.full((rows, -(-cols // 4) * 4), torch.nan)
    padded[:, :cols] = quantized.scale_inv
    return quantized.weight.view(torch.uint8), padded
