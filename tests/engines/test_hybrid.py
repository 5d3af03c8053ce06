"""Tiny NemotronH: Mamba, experts without a gate, attention and an MLP in one model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from tests import skips
from tests.engines import world

if TYPE_CHECKING:
    from pathlib import Path

IN_PROJ = "model.layers.0.mixer.in_proj.weight"
"""1288 rows: its parts do not end with blocks, so no engine can hold it in blockwise FP8."""


def seen(llm: Any) -> torch.Tensor:
    return torch.cat([world.logprobs(llm), world.decoded_logprobs(llm)])


@pytest.mark.parametrize("options", [{}, pytest.param(world.GRAPHS, marks=pytest.mark.gpu)])
def test_equals_a_fresh_load(options: dict[str, Any], tmp_path: Path) -> None:
    # vLLM for the processor has no kernel for experts without a gate; elsewhere it has none in blockwise
    # FP8, for which it makes room for gates that no checkpoint holds.
    sorts = {} if skips.cuda_devices() else {"layers_block_type": ["mamba", "attention", "mlp"]}
    models = [world.tiny_model("hybrid", seed, **sorts) for seed in (1, 2)]
    plain = [IN_PROJ, *(name for name, _ in world.hf_tensors(models[0]) if ".experts." in name)]
    expected = []
    for number, model in enumerate(models):
        folder = world.write_checkpoint(model, tmp_path / str(number), "pow2", plain=plain)
        fresh = world.start_engine(folder, **options)
        expected.append(seen(fresh))
        world.stop_engine(fresh)
        del fresh
        world.forget_engines()
    assert (expected[0] - expected[1]).abs().max().item() > 0.0
    folder = world.write_config(models[0], tmp_path / "config", plain=plain)
    live = world.start_engine(folder, load_format="dummy", **options)
    recipe = world.recipe("blockwise-pow2")
    recipe = replace(recipe, unquantized=(*recipe.unquantized, "*.in_proj"))
    for turn in (0, 1, 0):
        report = fp8sync.refit(models[turn], live, recipe)
        assert (seen(live) - expected[turn]).abs().max().item() == 0.0
    found = {t.name: t for t in report.tensors}
    assert found["model.layers.0.mixer.A_log"].route == "misc"  # the engine keeps -exp(A_log)
    assert found[IN_PROJ].encoding == "plain"
    if skips.cuda_devices():
        assert found["model.layers.1.mixer.experts.3.up_proj.weight"].encoding == "plain"
        assert found["model.layers.1.mixer.shared_experts.up_proj.weight"].encoding == "blockwise"
    del live
    world.forget_engines()
