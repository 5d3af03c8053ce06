"""Data-parallel replicas that share their experts: each worker holds its own, and all of the rest."""

from __future__ import annotations

from contextlib import closing
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


def test_refits_are_fresh_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PORT")  # from which both replicas would take the first
    one, other = (world.tiny_model("moe", seed) for seed in (1, 2))
    folder = world.write_checkpoint(one, tmp_path / "fresh", "pow2")
    with closing(dealing(folder, load_format="auto")) as engine:
        fresh = replicas_logprobs(engine)

    recipe = world.recipe("blockwise-pow2")
    with closing(dealing(world.write_config(one, tmp_path / "engine"))) as engine:
        for model, equal in ((one, True), (other, False), (one, True)):
            with fp8sync.connect(model, engine.llm, recipe) as link:
                first, second = (experts_of(link, rank) for rank in range(REPLICAS))
                assert len(first) == len(second) > 0
                assert not first & second
                link.refit()
                assert ((replicas_logprobs(engine) - fresh).abs().max().item() == 0.0) is equal
                assert link.audit().equal


def experts_of(link: fp8sync.Link, rank: int) -> set[str]:
    """The matrices of experts of which a worker holds some."""
    boxes = link.manifests["engine"].ranks[rank]
    return {box.tensor for box in boxes if ".experts." in box.tensor}
