"""Experts that would move away from their boxes, or go on with their first weights, are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import fp8sync
from tests import skips
from tests.engines import world

if TYPE_CHECKING:
    from pathlib import Path


def test_expert_load_balancing_is_refused(tmp_path: Path) -> None:
    """vLLM starts with it on several GPUs only; here its flag is set in a live engine's layers."""
    model = world.tiny_model("moe", 1)
    llm = world.start_engine(world.write_config(model, tmp_path), load_format="dummy")

    def balance(on: bool) -> None:
        def write(live: torch.nn.Module) -> None:
            for module in live.modules():
                if (config := getattr(module, "moe_config", None)) is not None:
                    config.moe_parallel_config.enable_eplb = on

        llm.apply_model(write)

    fp8sync.refit(model, llm, world.recipe("blockwise"))
    before = world.logprobs(llm)
    balance(True)
    with pytest.raises(fp8sync.UnsupportedLayout, match="load balancing") as refusal:
        fp8sync.connect(world.tiny_model("moe", 2), llm, world.recipe("blockwise"))
    layers = {f"model.layers.{layer}.mlp.experts" for layer in range(2)}
    assert layers <= {line.partition(" (engine rank 0)")[0] for line in refusal.value.violations}
    balance(False)
    assert torch.equal(world.logprobs(llm), before)
    world.forget_engines()


def test_experts_that_would_keep_their_first_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM for the processor does from 0.28 on; this one is told that it is."""
    model = world.tiny_model("moe", 1)
    folder = world.write_config(model, tmp_path, fp8=False)
    llm = world.start_engine(folder, load_format="dummy")
    monkeypatch.setattr("vllm.__version__", "0.28.0")
    if skips.cuda_devices():
        fp8sync.connect(model, llm, "bf16").close()
        return
    with pytest.raises(fp8sync.UnsupportedLayout, match="their first weights") as refusal:
        fp8sync.connect(model, llm, "bf16")
    experts = {f"model.layers.{layer}.mlp.experts.routed_experts" for layer in range(2)}
    assert experts == {line.partition(" (engine rank 0)")[0] for line in refusal.value.violations}
    assert all("found vLLM 0.28.0 on the processor" in line for line in refusal.value.violations)
    world.forget_engines()
