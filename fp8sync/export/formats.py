"""What becomes of each tensor in a checkpoint, and the `quantization_config` that says so."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.errors import NonFiniteWeight, RecipeMismatch, UnsupportedLayout
from fp8sync.plan.boxes import block_shape
from fp8sync.recipe import BLOCK, Encoding, Formula, Recipe
from fp8sync.sources.checkpoint import SCALE_SUFFIX
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8sync.export.whole import Band
    from fp8sync.manifest import TensorInfo

__all__ = ["Written", "encode", "plan_formats", "quantization_config"]

_EMBEDDINGS = ("*embed*", "*.wte", "*.wpe")
_IN_FLOAT32 = ("*.e_score_correction_bias",)
"""Tensors that checkpoints keep in float32 beside BF16 weights."""


@dataclass(frozen=True, slots=True)
class Written:
    """An HF tensor as a checkpoint holds it.

    Args:
        info: as the trainer holds it.
        dtype: torch name of what is written.
        formula: of the scales written beside it, if it is written as FP8.
        rounded: formula by which its values are quantized and dequantized again.
    """

    info: TensorInfo
    dtype: str
    formula: Formula | None = None
    rounded: Formula | None = None

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return (dtype, shape) by the names in the checkpoint."""
        found = {self.info.name: (self.dtype, self.info.shape)}
        if self.formula is not None:
            found[self.info.name + SCALE_SUFFIX] = "float32", block_shape(self.info.shape)
        return found


def plan_formats(tensors: Mapping[str, TensorInfo], recipe: Recipe) -> dict[str, Written]:
    """Say how every tensor is written.

    With a recipe that quantizes, FP8 pairs of the trainer are written as they are, and then what it
    holds unquantized stays so. Where it has no pairs, all matrices are quantized but embeddings and
    what the recipe leaves unquantized; by `pow2` unless the recipe names a formula.

    Raises:
        UnsupportedLayout: FP8 codes whose scales the source does not know as such.
        RecipeMismatch: pairs by another formula than the recipe names.
    """
    pairs = {n: i for n, i in tensors.items() if i.encoding is Encoding.BLOCKWISE}
    found, faults, bare = {}, [], []
    for name, info in tensors.items():
        formula = None
        if info.encoding is Encoding.PLAIN and info.dtype.startswith("float8"):
            bare.append(f"{name}: expected scales of its {info.dtype} codes, found none")
        if name in pairs and recipe.quantizes:
            formula = info.formula or Formula.FP32
            if recipe.formula(formula) is not formula:
                faults.append(f"{name}: an FP8 pair with {formula.value} scales")
        elif recipe.quantizes and not pairs and _is_quantizable(info, recipe):
            formula = recipe.formula(Formula.POW2)
        if formula is None or recipe.dequantize:
            found[name] = Written(info, _plain_dtype(info), rounded=formula)
        else:
            found[name] = Written(info, "float8_e4m3fn", formula)
    if bare:
        raise UnsupportedLayout("FP8 codes without scales", bare)
    if faults:
        raise RecipeMismatch(f"recipe {recipe.name!r} would quantize pairs anew", faults)
    return found


def encode(band: Band, written: Written) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a band as it is written: elements, or codes and scale_inv.

    Raises:
        NonFiniteWeight: NaN or Inf.
    """
    weight, scale_inv = band.weight, band.scale_inv
    bad = int((~torch.isfinite(weight.float())).sum()) if weight.is_floating_point() else 0
    bad += 0 if scale_inv is None else int((~torch.isfinite(scale_inv)).sum())
    if bad:
        fault = f"{band.held_by}: expected finite values, found {bad} NaN or Inf"
        raise NonFiniteWeight("NaN or Inf in the trainer's weights", [fault])
    formula = written.formula or written.rounded
    if scale_inv is None and formula is not None:
        weight, scale_inv, _ = quantize_blockwise(weight, formula.value)
    if written.formula is not None:
        return weight, scale_inv
    dtype = getattr(torch, written.dtype)
    if scale_inv is not None:
        return dequantize_blockwise(weight, scale_inv, dtype), None
    return weight.to(dtype), None


def quantization_config(written: Mapping[str, Written]) -> dict[str, Any]:
    """Return what `config.json` has to say of FP8 weights; nothing where there are none.

    `modules_to_not_convert` names every module of which a matrix, or a stack of them, stays unquantized.
    """
    if all(w.formula is None for w in written.values()):
        return {}
    kept = [n for n, w in written.items() if w.formula is None and len(w.info.shape) > 1]
    told = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(dict.fromkeys(n.rpartition(".")[0] or n for n in kept)),
    }
    return {"quantization_config": told}


def _is_quantizable(info: TensorInfo, recipe: Recipe) -> bool:
    module, _, kind = info.name.rpartition(".")
    embeds = any(fnmatchcase(module, pattern) for pattern in _EMBEDDINGS)
    matrix = kind == "weight" and len(info.shape) == 2 and info.dtype in _FLOATS
    return matrix and not embeds and not recipe.leaves_unquantized(info.name)


_FLOATS = ("bfloat16", "float16", "float32", "float64")


def _plain_dtype(info: TensorInfo) -> str:
    exact = any(fnmatchcase(info.name, pattern) for pattern in _IN_FLOAT32)
    floats = info.dtype in _FLOATS or info.encoding is Encoding.BLOCKWISE
    return "bfloat16" if floats and not exact else info.dtype
