"""The turns that members of a group take: nobody waits in a circle, and no link for longer than it must."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from fp8sync.errors import PlanMismatch
from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.layouts.presets import PRESETS
from fp8sync.plan import Bucket, build_plan, fill_buckets, order_of
from fp8sync.plan.order import RUN, in_order
from fp8sync.sending.turns import in_runs

SHAPES = [(1, 1), (1, 4), (2, 2), (2, 4), (4, 2), (3, 5), (4, 4)]
SIZE = 32 << 20
QWEN, LLAMA = "qwen3-30b-a3b", "llama-3.1-8b"
MAPPINGS = [
    (QWEN, TrainerLayout(tp=2), EngineLayout(tp=2, expert_parallel=True)),
    (QWEN, TrainerLayout(dp=2, fsdp=2), EngineLayout(tp=2)),
    (QWEN, TrainerLayout(tp=2, pp=2, ep=2, etp=1), EngineLayout(tp=4, expert_parallel=True)),
    (LLAMA, TrainerLayout(dp=3, fsdp=3), EngineLayout()),
    (LLAMA, TrainerLayout(tp=2, pp=4), EngineLayout(tp=4)),
    (LLAMA, TrainerLayout(tp=2), EngineLayout(tp=4)),
    (LLAMA, TrainerLayout(), EngineLayout(tp=4)),
]


def end(members: dict[str, list[Bucket]]) -> int:
    """When all is done, in bytes of one link, if each message waits for both of its members."""
    left = {name: list(reversed(own)) for name, own in members.items()}
    free: Counter[str] = Counter()
    while any(left.values()):
        heads = {name: own[-1] for name, own in left.items() if own}
        met = [
            b
            for name, b in heads.items()
            if name[0] == "t" and heads.get(f"w{b.destination_rank}") is b
        ]
        assert met, f"all wait for one another: {heads}"
        for bucket in met:
            both = f"t{bucket.source_rank}", f"w{bucket.destination_rank}"
            done = max(free[name] for name in both) + bucket.nbytes
            for name in both:
                free[name] = done
                left[name].pop()
    return max(free.values())


def members(buckets: list[Bucket], order: list[tuple[int, int, int]]) -> dict[str, list[Bucket]]:
    """What every member takes, message by message."""
    found: dict[str, list[Bucket]] = {}
    for side, rank_of in (("t", lambda b: b.source_rank), ("w", lambda b: b.destination_rank)):
        for rank in sorted({rank_of(b) for b in buckets}):
            turns = in_runs([b for b in buckets if rank_of(b) == rank], order)
            assert all(len(turn) == 1 for turn in turns)
            found[f"{side}{rank}"] = [bucket for (bucket,) in turns]
    return found


@pytest.mark.parametrize(("trainers", "workers"), SHAPES)
@pytest.mark.parametrize("uneven", [False, True])
def test_nobody_waits_in_a_circle(trainers: int, workers: int, uneven: bool) -> None:
    most = 2 * RUN + 3
    routes = list(product(range(trainers), range(workers)))
    count = {r: (5 * r[0] + 3 * r[1]) % most if uneven else most for r in routes}
    buckets = [Bucket(n, *r, (), 16) for r in routes for n in range(count[r])]
    order = in_order({r: [16] * n for r, n in count.items() if n})
    assert all(0 < run <= RUN for _, _, run in order)
    busiest = max([0, *Counter(b.source_rank for b in buckets).values()])
    busiest = max([busiest, *Counter(b.destination_rank for b in buckets).values()])
    if buckets:
        assert 16 * busiest <= end(members(buckets, order)) <= 1.3 * 16 * busiest


@pytest.mark.parametrize(("model", "trainer", "engine"), MAPPINGS)
def test_all_end_when_the_busiest_link_can(
    model: str, trainer: TrainerLayout, engine: EngineLayout
) -> None:
    """Also where two stages of a pipeline feed the same workers: one stream of turns is enough."""
    shape = replace(PRESETS[model], layers=8)
    source, wanted = manifest(trainer, shape), manifest(engine, shape)
    plan = build_plan(source, wanted, exchange_amax=True)
    buckets = [b for rank in wanted.ranks for b in fill_buckets(plan.fed(rank), SIZE)]
    load: Counter[str] = Counter()
    for bucket in buckets:
        load[f"t{bucket.source_rank}"] += bucket.nbytes
        load[f"w{bucket.destination_rank}"] += bucket.nbytes
    assert end(members(buckets, order_of(plan, wanted.ranks, SIZE))) < 1.01 * max(load.values())


def test_buckets_of_a_route_stay_in_order() -> None:
    buckets = [Bucket(n, 0, w, (), 16) for w in range(3) for n in range(2 * RUN)]
    seen: Counter[int] = Counter()
    order = in_order({(t, w): [16] * 2 * RUN for t in range(2) for w in range(3)})
    for (bucket,) in in_runs(buckets, order):
        assert bucket.index == seen[bucket.destination_rank]
        seen[bucket.destination_rank] += 1


@pytest.mark.parametrize("count", [2, 4])
def test_an_order_of_other_messages_is_refused(count: int) -> None:
    buckets = [Bucket(n, 1, 0, (), 16) for n in range(3)]
    text = f"trainer rank 1 to engine rank 0: expected 3 messages, found {count}"
    with pytest.raises(PlanMismatch, match=text):
        in_runs(buckets, [(0, 0, 3), (1, 0, count)])
