"""What an engine starts from: a config.json, or a checkpoint quantized without any transfer code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.recipe import BLOCK, Encoding, Formula
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from fp8sync.manifest import TensorInfo
    from fp8sync.recipe import Recipe

__all__ = ["quantize_checkpoint", "write_config"]


def write_config(config: Any, tensors: Iterable[str], recipe: Recipe, directory: Path) -> Path:
    """Write config.json, in the form of the official blockwise-FP8 checkpoints where it quantizes.

    Args:
        config: a transformers configuration.
        tensors: HF parameter names.
        recipe: says what stays unquantized.
        directory: made if it is not there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    content = json.loads(config.to_json_string(use_diff=False))
    content["dtype"] = content["torch_dtype"] = "bfloat16"
    if recipe.quantizes and not recipe.dequantize:
        kept = [name.rsplit(".", 1)[0] for name in tensors if recipe.leaves_unquantized(name)]
        content["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": kept,
        }
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@torch.no_grad()
def quantize_checkpoint(
    source: Path,
    target: Path,
    tensors: Mapping[str, TensorInfo],
    recipe: Recipe,
    pairs: Mapping[str, Formula] | None = None,
) -> None:
    """Write the safetensors files of `source` as a fresh engine is to load them.

    Args:
        source: holds *.safetensors in BF16, as transformers saves them.
        target: holds config.json already.
        tensors: how the engine holds each; the plan's.
        recipe: with `dequantize`, the values of the pairs are written instead of the pairs.
        pairs: what the trainer holds as FP8 pairs; an engine of another format gets these rounded values.
    """
    from safetensors.torch import load_file, save_file

    for path in sorted(source.glob("*.safetensors")):
        written: dict[str, torch.Tensor] = {}
        for name, weight in load_file(path).items():
            info, held = tensors[name], (pairs or {}).get(name)
            passed_through = held is info.formula
            values = weight if held is None or passed_through else _rounded(weight, held)
            if info.encoding is not Encoding.BLOCKWISE or info.formula is None:
                written[name] = values.to(weight.dtype)
            elif recipe.dequantize:
                written[name] = _rounded(values, info.formula).to(torch.bfloat16)
            else:
                pair = quantize_blockwise(values, info.formula.value)
                written[name], written[name + "_scale_inv"] = pair.weight, pair.scale_inv
        save_file(written, target / path.name, {"format": "pt"})
    index = source / "model.safetensors.index.json"
    if index.exists():
        raise ValueError(f"{index}: a checkpoint of several files; save it as one")


def _rounded(weight: torch.Tensor, formula: Formula) -> torch.Tensor:
    """Return the values of the FP8 pair that a formula makes of a weight, in float32."""
    pair = quantize_blockwise(weight, formula.value)
    return dequantize_blockwise(pair.weight, pair.scale_inv, torch.float32)
