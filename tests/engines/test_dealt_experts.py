"""Data-parallel replicas that share their experts: each worker holds its own, and all of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import fp8sync
from tests.engines import world
from tests.engines.test_async import Engine

if TYPE_CHECKING:
    from pathlib import Path

REPLICAS = 2
# vLLM has no exchange of tokens between replicas on the processor.
pytestmark = pytest.mark.multigpu(REPLICAS)


def dealing(folder: Path, **options: str) -> Engine:
    """An engine of replicas that deal their experts to one another."""
    return Engine(
        folder,
        data_parallel_size=REPLICAS,
        enable_expert_parallel=True,
        distributed_executor_backend=world.ONE_PROCESS,
        max_model_len=128,
        **options,
    )


def replicas_logprobs(engine: Engine) -> torch.Tensor:
    """Log-probabilities of each replica: float64 [replicas, positions, 256]."""
    return torch.stack([engine.logprobs(data_parallel_rank=n) for n in range(REPLICAS)])


def test_three_refits_are_fresh_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PORT", raising=False)  # from which both replicas would take the first
    models = [world.tiny_model("moe", seed) for seed in (1, 2)]
    fresh = []
    for number, model in enumerate(models):
        folder = world.write_checkpoint(model, tmp_path / f"fresh{number}", "pow2")
        engine = dealing(folder, load_format="auto")
        fresh.append(replicas_logprobs(engine))
        engine.close()
    assert (fresh[0] - fresh[1]).abs().max().item() > 0.0

    engine = dealing(world.write_config(models[0], tmp_path / "engine"))
    with fp8sync.connect(models[0], engine.llm, world.recipe("blockwise-pow2")) as link:
        link.refit()
        assert (replicas_logprobs(engine) - fresh[0]).abs().max().item() == 0.0
        assert link.audit().equal
    for model, expected in zip(models[::-1], fresh[::-1], strict=True):
        fp8sync.refit(model, engine.llm, world.recipe("blockwise-pow2"))
        assert (replicas_logprobs(engine) - expected).abs().max().item() == 0.0
    engine.close()
