"""Layers that predict further tokens: trainers and checkpoints have them, an engine's main model does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from fp8sync.sources import CheckpointSource
from tests.engines import world
from tests.engines.test_bad_input import Edited, added

if TYPE_CHECKING:
    from pathlib import Path

MTP = "model.layers.2."
NORM = "model.layers.1.input_layernorm.weight"


def check_left_out(link: Any, report: fp8sync.RefitReport) -> None:
    said = link.plan.explain()
    left_out = [t for t in report.tensors if t.route == "left out"]
    assert {f"{MTP}eh_proj.weight", f"{MTP}mlp.experts.7.up_proj.weight"} <= {
        t.name for t in left_out
    }
    for tensor in report.tensors:
        assert (tensor.route == "left out") == tensor.name.startswith(MTP)
    for tensor in left_out:
        assert tensor.bytes == 0
        assert "(num_hidden_layers 2, num_nextn_predict_layers 1)" in tensor.reason
        assert f"left out {tensor.name}: {tensor.reason}" in said
    assert said.startswith(f"{len(report.tensors) - len(left_out)} tensors in ")


def test_refit_leaves_them_out_by_name(tmp_path: Path) -> None:
    """Of a module and of a checkpoint; what else the engine takes nothing of is refused."""
    models = [world.tiny_model("glm", seed) for seed in (1, 2)]
    folders = [
        world.write_checkpoint(model, tmp_path / str(number), "pow2")
        for number, model in enumerate(models)
    ]
    expected = []
    for folder in folders:
        fresh = world.start_engine(folder)
        expected.append(world.logprobs(fresh))
        world.stop_engine(fresh)
        del fresh
        world.forget_engines()
    assert (expected[0] - expected[1]).abs().max().item() > 0.0
    folder = world.write_config(models[0], tmp_path / "config")
    live = world.start_engine(folder, load_format="dummy")
    recipe = world.recipe("blockwise-pow2")
    for turn, source in ((0, models[0]), (1, models[1]), (0, CheckpointSource(folders[0]))):
        with fp8sync.connect(source, live, recipe) as link:
            report = link.refit()
            check_left_out(link, report)
            assert not link.audit().differences
        assert (world.logprobs(live) - expected[turn]).abs().max().item() == 0.0
    unknown = {
        "model.layers.3.input_layernorm.weight": "the loader refuses it",
        "model.layers.0.rotary_emb.inv_freq": "found 0 taken",
    }
    for name, reason in unknown.items():
        source = Edited(models[0], added(name, NORM))
        with pytest.raises(fp8sync.TensorMismatch) as refusal:
            fp8sync.connect(source, live, recipe)
        (line,) = refusal.value.violations
        assert line.startswith(f"{name} (")
        assert reason in line
    del live
    world.forget_engines()
