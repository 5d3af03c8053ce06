"""Exported directories against what transformers saved, and against quantizing what it saved."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from fp8sync.cli import main
from fp8sync.errors import Fp8SyncError, NonFiniteWeight, RecipeMismatch, UnsupportedLayout
from fp8sync.export import export_checkpoint
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.recipe import Recipe
from fp8sync.sources import CheckpointSource
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise
from tests.export.checkpoints import LINEAR, SCALES, assert_same, config, read
from tests.megatron import models

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ["qwen3", "qwen3-tied", "qwen3-moe", "llama", "qwen2", "deepseek-v3", "gpt-oss"]
BAND = 100_000  # bytes: every matrix here becomes several bands


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("shard_bytes", [1 << 20, 1 << 30])
def test_bf16_is_what_transformers_saved(saved: Path, tmp_path: Path, shard_bytes: int) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    made = export_checkpoint(
        model, tmp_path, shard_bytes=shard_bytes, band_bytes=BAND, progress=False
    )
    expected = read(saved)
    for name, tensor in expected.items():
        if name.endswith("e_score_correction_bias"):  # transformers loads it in float32
            expected[name] = tensor.float()
    assert_same(read(tmp_path), expected)
    nbytes = sum(tensor.nbytes for tensor in expected.values())
    assert (made.tensors, made.quantized, made.bytes) == (len(expected), 0, nbytes)
    assert made.files == len(list(tmp_path.glob("*.safetensors")))
    assert (made.files > 1) == (tmp_path / "model.safetensors.index.json").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_fp8_is_the_quantized_checkpoint(
    saved: Path, tmp_path: Path, formula: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = read(saved)
    linear = [name for name in expected if name.endswith(LINEAR)]
    kept = {n.rpartition(".")[0] for n, t in expected.items() if t.dim() > 1 and n not in linear}
    assert ("model.layers.0.mlp.experts" in kept) is (saved.name.startswith("gpt-oss"))
    for name in linear:
        q = quantize_blockwise(expected[name], formula)
        expected[name], expected[name + SCALES] = q.weight, q.scale_inv
    command = ["export", str(saved), str(tmp_path), "--format", "fp8", "--formula", formula]
    assert main(command) == 0
    assert_same(read(tmp_path), expected)
    count, nbytes = len(expected) - len(linear), sum(t.nbytes for t in expected.values())
    said = capsys.readouterr()
    assert f"{count} tensors, {len(linear)} in FP8, {nbytes} bytes in 1 files" in said.out
    assert "export: 100%" in said.err
    if linear:
        told = config(tmp_path)["quantization_config"]
        assert (told["quant_method"], told["weight_block_size"]) == ("fp8", [128, 128])
        assert sorted(told["modules_to_not_convert"]) == sorted(kept)


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_fp8_pairs_are_written_as_they_are_held(tmp_path: Path, formula: str) -> None:
    """Also where some layers are not FP8; and in BF16, their values."""
    saved = models.write_checkpoint("qwen3", tmp_path / "saved")
    recipe = Recipe(f"blockwise-{formula}", unquantized=("lm_head", "model.layers.0.*"))
    export_checkpoint(saved, tmp_path / "pairs", recipe, progress=False)
    pairs = read(tmp_path / "pairs")
    assert not any(n.startswith("model.layers.0.") and n.endswith(SCALES) for n in pairs)

    export_checkpoint(tmp_path / "pairs", tmp_path / "again", "blockwise", progress=False)
    assert_same(read(tmp_path / "again"), pairs)
    assert config(tmp_path / "again") == config(tmp_path / "pairs")
    left = config(tmp_path / "again")["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.mlp.gate_proj" in left
    assert "model.layers.1.mlp.gate_proj" not in left

    export_checkpoint(tmp_path / "pairs", tmp_path / "values", "bf16", progress=False)
    rounded = Recipe(f"blockwise-{formula}", True, recipe.unquantized)
    export_checkpoint(saved, tmp_path / "rounded", rounded, progress=False)
    expected = {
        name: dequantize_blockwise(tensor, pairs[name + SCALES], torch.bfloat16)
        if name + SCALES in pairs
        else tensor
        for name, tensor in pairs.items()
        if not name.endswith(SCALES)
    }
    for folder in ("values", "rounded"):
        assert_same(read(tmp_path / folder), expected)
        assert "quantization_config" not in config(tmp_path / folder)

    other = "fp32" if formula == "pow2" else "pow2"
    with pytest.raises(RecipeMismatch, match=f"an FP8 pair with {formula} scales"):
        export_checkpoint(tmp_path / "pairs", tmp_path / "other", f"blockwise-{other}")


def test_scales_in_bf16_are_read(tmp_path: Path) -> None:
    """Some published directories keep scale_inv in BF16."""
    weight = quantize_blockwise(torch.randn(256, 128), "pow2")
    held = {"a.weight": weight.weight, "a.weight_scale_inv": weight.scale_inv.bfloat16()}
    save_file(held, tmp_path / "model.safetensors")
    source = CheckpointSource(tmp_path)
    assert source.manifest().tensors["a.weight"].formula == "pow2"
    assert torch.equal(source.storages()["a.weight_scale_inv"], weight.scale_inv)


def test_nothing_is_left_of_an_export_that_failed(tmp_path: Path) -> None:
    saved = models.write_checkpoint("qwen3", tmp_path / "saved")
    tensors = read(saved)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][300, 3] = torch.nan
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    for recipe in ("bf16", "blockwise"):
        with pytest.raises(NonFiniteWeight) as error:
            export_checkpoint(saved, tmp_path / "made", recipe, band_bytes=BAND, progress=False)
        assert error.value.violations == (
            f"{name} (trainer rank 0): expected finite values, found 1 NaN or Inf",
        )
        assert not list((tmp_path / "made").iterdir())


def test_weights_are_not_overwritten(tmp_path: Path) -> None:
    saved = models.write_checkpoint("qwen3", tmp_path)
    before = read(saved)
    assert main(["export", str(saved), str(saved), "--format", "fp8"]) == 1
    with pytest.raises(Fp8SyncError, match=r"has weights already: model\.safetensors"):
        export_checkpoint(saved, saved)
    assert_same(read(saved), before)


def test_a_model_without_a_config_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(Fp8SyncError, match=r"expected a config: a directory with config\.json"):
        export_checkpoint(torch.nn.Linear(128, 128), tmp_path / "made", progress=False)
    assert not (tmp_path / "made").exists()


def test_files_beside_the_weights_are_copied(tmp_path: Path) -> None:
    saved = models.write_checkpoint("qwen3", tmp_path / "saved")
    for name in ("tokenizer.json", "modeling_own.py", "preprocessor_config.json"):
        (saved / name).write_text("{}")
    expected = {path.name for path in saved.iterdir()}
    (saved / "tokenizers").mkdir()  # what is no file is left where it is
    export_checkpoint(saved, tmp_path / "made", progress=False)
    assert {path.name for path in (tmp_path / "made").iterdir()} == expected
    assert json.loads((tmp_path / "made/tokenizer.json").read_text()) == {}


def test_a_folder_may_have_its_config_already(tmp_path: Path) -> None:
    saved = models.write_checkpoint("qwen3", tmp_path / "saved")
    made = tmp_path / "made"
    made.mkdir()
    for name in ("config.json", "generation_config.json"):
        (made / name).write_text((saved / name).read_text())
    export_checkpoint(saved, made, config=made, progress=False)
    assert config(made) == config(saved)
    assert_same(read(made), read(saved))


def test_codes_without_scales_are_not_exported(tmp_path: Path) -> None:
    """As transformers holds a model that it loads in FP8: the scales would be one more parameter."""
    model = torch.nn.Linear(128, 256, bias=False)
    held = quantize_blockwise(model.weight.detach(), "fp32")
    model.weight = torch.nn.Parameter(held.weight, requires_grad=False)
    model.weight_scale_inv = torch.nn.Parameter(held.scale_inv)
    for recipe in ("bf16", "blockwise"):
        with pytest.raises(UnsupportedLayout) as error:
            export_checkpoint(model, tmp_path / "made", recipe, config={"model_type": "mine"})
        fault = "weight: expected scales of its float8_e4m3fn codes, found none"
        assert error.value.violations == (fault,)
    assert not (tmp_path / "made").exists()


def test_what_is_quantized_otherwise_is_not_exported(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    save_file({"a.qweight": torch.zeros(16, 128, dtype=torch.int32)}, saved / "model.safetensors")
    told = {"model_type": "mine", "quantization_config": {"quant_method": "gptq"}}
    (saved / "config.json").write_text(json.dumps(told))
    with pytest.raises(Fp8SyncError, match="expected BF16 or blockwise FP8, found gptq"):
        export_checkpoint(saved, tmp_path / "made", progress=False)
    assert not (tmp_path / "made").exists()


class Halves:
    """A source whose boxes are rows of one matrix; `prepared` counts."""

    tiles = True

    def __init__(self, *rows: tuple[int, int]) -> None:
        self._rows, self.prepared = rows, 0
        self._live = {f"rows{first}": torch.ones(count, 128).bfloat16() for first, count in rows}

    def prepare(self) -> None:
        self.prepared += 1

    def manifest(self) -> Manifest:
        boxes = [
            Box("a.weight", (first, 0), (count, 128), Placement(f"rows{first}", 0, (128, 1)))
            for first, count in self._rows
        ]
        return Manifest.of([TensorInfo("a.weight", (256, 128), "bfloat16")], {0: boxes})

    def storages(self) -> dict[str, torch.Tensor]:
        assert self.prepared
        return self._live


def test_what_the_ranks_do_not_hold_once_is_not_exported(tmp_path: Path) -> None:
    for rows, said in (((0, 128),), "found 16384"), (((0, 192), (128, 128)), "which overlap"):
        with pytest.raises(UnsupportedLayout, match=f"a.weight: expected .*{said}"):
            export_checkpoint(Halves(*rows), tmp_path / "made", config={"model_type": "mine"})
    assert not (tmp_path / "made").exists()
    source = Halves((0, 128), (128, 128))
    export_checkpoint(source, tmp_path / "made", config={"model_type": "mine"}, progress=False)
    assert source.prepared == 1  # it may be a whole export of tensors that are no boxes


def test_options_of_the_command_that_would_do_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["export", str(tmp_path), str(tmp_path / "made"), "--format", "bf16"]
    for option in (["--formula", "pow2"], ["--unquantized", "lm_head"]):
        assert main([*asked, *option]) == 1
        assert "are of --format fp8, not of bf16" in capsys.readouterr().err
