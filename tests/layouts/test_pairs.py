"""Every trainer layout to every engine layout: the bytes are those of the whole tensor, quantized and cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fp8sync.layouts import geometry, manifest
from fp8sync.manifest import Manifest
from fp8sync.plan import Planner, build_plan, messages_of, stamps_of
from fp8sync.plan.traffic import traffic
from fp8sync.recipe import Encoding, Formula
from fp8sync.sending.share import Share, own_buckets
from tests.layouts import wire
from tests.layouts.cases import PAIRS, Case

BUCKET_BYTES = 60_000


def engine_of(case: Case, formula: Formula):
    return replace(case.engine, formula=case.engine.formula and formula)


@pytest.mark.parametrize("formula", list(Formula), ids=lambda f: f.value)
@pytest.mark.parametrize("name", PAIRS)
def test_bytes_are_those_of_the_whole_tensor(name: str, formula: Formula) -> None:
    case = PAIRS[name]
    trainer = replace(case.trainer, pairs=case.trainer.pairs and formula)
    source = manifest(trainer, case.model)
    destination = manifest(engine_of(case, formula), case.model)
    plan = build_plan(source, destination, exchange_amax=True)
    assert bool(plan.amax) == (case.amax and case.engine.formula is not None)
    assert any(info.misc for info in plan.tensors.values()) == case.misc
    tensors = wire.random_tensors(source)
    held = wire.storages(source, wire.quantized(source, tensors))
    wanted = wire.quantized(destination, tensors)
    found = wire.storages(destination, None)
    wire.carry_out(plan, held, found, BUCKET_BYTES)
    assert not wire.differing(found, wire.storages(destination, wanted))


@pytest.mark.parametrize(
    "name", [n for n, case in PAIRS.items() if case.engine.scales or not case.engine.formula]
)
def test_bytes_written_one_sided_are_the_same(name: str) -> None:
    """The writer's own tables, as the processor carries them out, cut blocks among them."""
    case = PAIRS[name]
    source = manifest(case.trainer, case.model)
    destination = manifest(case.engine, case.model)
    plan = build_plan(source, destination, exchange_amax=True)
    tensors = wire.random_tensors(source)
    found = wire.storages(destination, None)
    held = wire.storages(source, wire.quantized(source, tensors))
    assert not wire.write_out(plan, held, found)
    wanted = wire.quantized(destination, tensors)
    assert not wire.differing(found, wire.storages(destination, wanted))


@pytest.mark.parametrize("name", PAIRS)
def test_the_forecast_counts_what_the_plan_moves(name: str) -> None:
    case = PAIRS[name]
    source, destination = manifest(case.trainer, case.model), manifest(case.engine, case.model)
    plan = build_plan(source, destination, exchange_amax=True)
    links: dict[tuple[int, int], int] = {}
    for copy in plan.copies:
        key = copy.source_rank, copy.destination_rank
        links[key] = links.get(key, 0) + copy.weight_bytes + copy.scale_bytes
    counted = traffic(geometry(case.trainer, case.model), geometry(case.engine, case.model))
    assert counted.links == links
    assert counted.copies == len(plan.copies)
    assert counted.amax.groups == len(plan.amax)
    assert counted.misc == {n: i.misc for n, i in plan.tensors.items() if i.misc}


@pytest.mark.parametrize("name", PAIRS)
def test_a_rank_alone_plans_what_all_plan_together(name: str) -> None:
    case = PAIRS[name]
    source, destination = manifest(case.trainer, case.model), manifest(case.engine, case.model)
    together = build_plan(source, destination, exchange_amax=True)
    planner = Planner(source, exchange_amax=True)
    for rank, boxes in destination.ranks.items():
        alone = planner.plan(Manifest(destination.tensors, {rank: boxes}))
        assert alone.to_rank(rank) == together.to_rank(rank)
        assert alone.digest(rank) == together.digest(rank)
    for rank in source.ranks:
        sent = planner.plan(destination, source_rank=rank)
        assert sent == together.sent_by(rank)
        assert sent.amax == together.amax
        assert sent.share_digests(rank) == together.share_digests(rank)


@pytest.mark.parametrize("name", sorted(PAIRS)[::9])
def test_a_rank_that_knows_what_it_sends_numbers_its_buckets_as_who_knows_all(name: str) -> None:
    case = PAIRS[name]
    source, destination = manifest(case.trainer, case.model), manifest(case.engine, case.model)
    plan = build_plan(source, destination, exchange_amax=True)
    messages = messages_of(plan, destination.ranks, 1 << 14)
    stamps = stamps_of(plan, messages)
    live: Any = None
    for rank in source.ranks:
        shares = [
            Share(live, rank, source, plan, 1.0, live),
            Share(live, rank, source, plan.sent_by(rank), 1.0, live, stamps=stamps.get(rank, [])),
        ]
        whole, alone = (own_buckets(share, destination.ranks, 1 << 14) for share in shares)
        assert alone == whole
        for bucket in whole:
            to = bucket.destination_rank
            assert shares[1].plan_id(to) == shares[0].plan_id(to)
        counted = {to: len(messages.get((rank, to), ())) for to in destination.ranks}
        assert {to: sum(b.destination_rank == to for b in whole) for to in counted} == counted


def test_there_are_enough_pairs() -> None:
    assert len(PAIRS) >= 60
    quantized = [c for c in PAIRS.values() if c.engine.formula]
    assert sum(c.amax for c in quantized) >= 15
    assert any(
        info.encoding is Encoding.BLOCKWISE and info.shape[0] == 576
        for info in PAIRS["mla-fsdp4-1"].engine.infos(PAIRS["mla-fsdp4-1"].model)
    )
