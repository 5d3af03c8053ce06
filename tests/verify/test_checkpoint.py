"""What a fresh engine loads is the formula's own result."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8sync.manifest import TensorInfo
from fp8sync.recipe import Encoding, Formula, Recipe
from fp8sync.verify.checkpoint import quantize_checkpoint, write_config
from fp8sync_kernels import quantize_blockwise
from tests.engines import world

if TYPE_CHECKING:
    from pathlib import Path

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("dequantize", [False, True])
def test_pairs_or_their_values(tmp_path: Path, *, dequantize: bool) -> None:
    weight = torch.randn(256, 128, dtype=torch.bfloat16)
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    save_file({NAME: weight, "norm.weight": weight[0].clone()}, tmp_path / "in/model.safetensors")
    tensors = {
        NAME: TensorInfo(NAME, (256, 128), "bfloat16", Encoding.BLOCKWISE, Formula.POW2),
        "norm.weight": TensorInfo("norm.weight", (128,), "bfloat16"),
    }
    recipe = Recipe("blockwise", dequantize=dequantize)
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", tensors, recipe)
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found["norm.weight"], weight[0])
    pair = quantize_blockwise(weight, "pow2")
    if dequantize:
        assert found[NAME].dtype == torch.bfloat16
        assert torch.equal(found[NAME][:128].float(), pair.weight[:128].float() * pair.scale_inv[0])
    else:
        assert torch.equal(found[NAME].view(torch.uint8), pair.weight.view(torch.uint8))
        assert torch.equal(found[NAME + "_scale_inv"], pair.scale_inv)


@pytest.mark.parametrize("wanted", [None, Formula.FP32, Formula.POW2])
def test_what_a_trainer_holds_in_fp8_is_rounded_first(
    tmp_path: Path, wanted: Formula | None
) -> None:
    weight = torch.randn(256, 128, dtype=torch.bfloat16)
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    save_file({NAME: weight}, tmp_path / "in/model.safetensors")
    how = (Encoding.BLOCKWISE, wanted) if wanted else ()
    tensors = {NAME: TensorInfo(NAME, (256, 128), "bfloat16", *how)}
    places = tmp_path / "in", tmp_path / "out"
    quantize_checkpoint(*places, tensors, Recipe("blockwise"), {NAME: Formula.FP32})
    found = load_file(tmp_path / "out/model.safetensors")
    held = quantize_blockwise(weight, "fp32")
    values = held.weight.float() * held.scale_inv.repeat_interleave(128, 0)
    if wanted is None:
        assert torch.equal(found[NAME], values.to(torch.bfloat16))
        assert not torch.equal(found[NAME], weight)
    else:  # passed through as it is, or quantized anew
        expected = held if wanted is Formula.FP32 else quantize_blockwise(values, "pow2")
        assert torch.equal(found[NAME].view(torch.uint8), expected.weight.view(torch.uint8))
        assert torch.equal(found[NAME + "_scale_inv"], expected.scale_inv)


def test_config_names_what_stays_unquantized(tmp_path: Path) -> None:
    model = world.tiny_model("moe", 0)
    names = [name for name, _ in world.hf_tensors(model)]
    path = write_config(model.config, names, Recipe("blockwise"), tmp_path / "new") / "config.json"
    kept = json.loads(path.read_text())["quantization_config"]["modules_to_not_convert"]
    assert set(kept) == {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    write_config(model.config, names, Recipe("bf16"), tmp_path / "new")
    assert "quantization_config" not in json.loads(path.read_text())
