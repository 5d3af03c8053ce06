"""Boxes are listed once per link, so an engine that moves its experts is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import fp8sync
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
