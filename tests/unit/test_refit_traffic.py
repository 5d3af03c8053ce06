"""Where members of the refit benchmark lie, and what its floor is made of."""

from __future__ import annotations

from collections import Counter

import pytest

from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.plan import build_plan
from fp8sync.plan.forward import shared, with_forwarding
from scripts.bench.refit_traffic import placed, processes_of, traffic
from tests.layouts.cases import QWEN


@pytest.mark.parametrize(
    ("stage", "trainers", "workers", "gpus", "lying", "processes"),
    [
        (2, 2, 2, 4, [0, 1, 2, 3], [0, 1, 2, 3]),
        (1, 1, 1, 2, [0, 1], [0, 1]),
        (2, 2, 2, 2, [1, 0, 0, 1], [1, 0, 2, 3]),
        (1, 1, 4, 2, [1, 0, 0, 1, 1], [1, 0, 2, 3, 5]),
        (3, 3, 1, 2, [1, 1, 0, 0], [1, 3, 0, 2]),
        (4, 4, 4, 2, [1, 1, 0, 0, 0, 0, 1, 1], [1, 3, 0, 2, 4, 6, 5, 7]),
        (2, 4, 4, 2, [1, 0, 1, 0, 0, 0, 1, 1], [1, 0, 3, 2, 4, 6, 5, 7]),
        (4, 4, 4, 4, [1, 2, 3, 0, 0, 1, 2, 3], [1, 2, 3, 0, 4, 5, 6, 7]),
    ],
)
def test_members_lie_alone_or_crosswise(
    stage: int, trainers: int, workers: int, gpus: int, lying: list[int], processes: list[int]
) -> None:
    assert placed(stage, trainers, workers, gpus) == lying
    assert processes_of(lying, gpus) == processes


@pytest.mark.parametrize(("stages", "workers"), [(1, 2), (1, 4), (2, 4)])
def test_crosswise_every_sharded_byte_crosses(stages: int, workers: int) -> None:
    """Only replicas stay, which lie on every rank of a stage."""
    held = manifest(TrainerLayout(tp=2, pp=stages), QWEN)
    plan = build_plan(held, manifest(EngineLayout(tp=workers), QWEN), exchange_amax=True)
    lying = placed(2, 2 * stages, workers, 2)
    trainers, engine = lying[: 2 * stages], lying[2 * stages :]
    moved = traffic(plan, trainers, engine)
    stayed = [c for c in plan.copies if trainers[c.source_rank] == engine[c.destination_rank]]
    assert all(len(copy.shape) == 1 for copy in stayed)
    assert moved.stayed == sum(copy.weight_bytes for copy in stayed)
    assert moved.most == moved.out[0] == moved.into[1] == moved.crossed // 2


def test_what_is_forwarded_leaves_the_worker_that_has_it() -> None:
    wanted = manifest(EngineLayout(dp=2), QWEN)
    plan = build_plan(manifest(TrainerLayout(), QWEN), wanted, exchange_amax=True)
    plan = with_forwarding(plan, shared(plan, {0: "node", 1: "node"}))
    sent = [copy.weight_bytes + copy.scale_bytes for copy in plan.copies if copy.via is None]
    handed = [copy.weight_bytes + copy.scale_bytes for copy in plan.copies if copy.via is not None]
    moved = traffic(plan, [0], [1, 2])
    assert moved.out[0] == sum(sent)
    assert moved.out[1] + moved.out[2] == sum(handed)
    assert moved.into[1] == moved.into[2] == moved.crossed // 2


def test_a_link_of_each_member() -> None:
    wanted = manifest(EngineLayout(tp=2), QWEN)
    plan = build_plan(manifest(TrainerLayout(tp=2), QWEN), wanted, exchange_amax=True)
    nbytes: Counter[int] = Counter()
    for copy in plan.copies:
        nbytes[copy.destination_rank] += copy.weight_bytes + copy.scale_bytes
    moved = traffic(plan, [0, 1], [2, 3])
    assert moved.into == {2: nbytes[0], 3: nbytes[1]}
    assert (moved.stayed, moved.crossed, moved.most) == (0, nbytes.total(), max(moved.out.values()))
