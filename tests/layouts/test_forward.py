"""Replicas of one node, fed once: every byte of every worker, bytes by link, and what goes wrong on the way.

Nodes are names that the tests give: the members are threads of one process, and what is simulated is where
they sit, not what they send each other.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8sync.errors import CorruptBucket, EngineLost, PeerFailed, TransferTimeout
from fp8sync.layouts import manifest
from fp8sync.manifest import Manifest
from fp8sync.plan import Plan, build_plan
from fp8sync.plan.forward import as_runs, from_runs, handed_on, shared, with_forwarding
from fp8sync.plan.spread import side_of
from fp8sync.plan.traffic import traffic
from fp8sync.recipe import Formula
from fp8sync.sending.nodes import choose_feeding
from fp8sync.transport.seat import NODE_VARIABLE, Seat, node_id
from fp8sync.wire.header import HEADER_BYTES
from fp8sync.wire.tables import unwritable
from tests.layouts import wire
from tests.layouts.cases import FEW_KV, LLAMA, MOE, QWEN, Case, E, T
from tests.layouts.test_ways import WAIT_S, Late, Meddler, Refit

if TYPE_CHECKING:
    from collections.abc import Callable

CASES: dict[str, tuple[Case, int]] = {
    "engines2": (Case(QWEN, T(), E(engines=2)), 2),
    "engines4-two-nodes": (Case(QWEN, T(dp=2), E(engines=4)), 2),
    "tp2.engines2": (Case(QWEN, T(tp=2), E(tp=2, engines=2)), 4),
    "kv2-tp4": (Case(FEW_KV, T(tp=2), E(tp=4)), 4),
    "tied-dp2": (Case(LLAMA, T(), E(dp=2)), 2),
    "moe-dp2.ep-engines2": (Case(MOE, T(dp=2, ep=2), E(dp=2, expert_parallel=True, engines=2)), 4),
    "fsdp3-cut-blocks": (Case(QWEN, T(dp=3, fsdp=3), E(engines=3)), 3),
    "bf16-engine": (Case(QWEN, T(), E(engines=2, formula=None)), 2),
    "dequantizing": (Case(QWEN, T(), E(engines=2, scales=False)), 2),
}
"""By name, a pair of layouts, and how many engine ranks fill a node."""


def sides(case: Case) -> tuple[Manifest, Manifest]:
    formula = Formula.POW2
    engine = replace(case.engine, formula=case.engine.formula and formula)
    return manifest(case.trainer, case.model), manifest(engine, case.model)


def planned(name: str) -> tuple[tuple[Manifest, Manifest], Plan, dict[int, int]]:
    case, per_node = CASES[name]
    both = sides(case)
    plan = build_plan(*both, exchange_amax=True)
    nodes = {rank: rank // per_node for rank in both[1].ranks}
    return both, with_forwarding(plan, shared(plan, nodes)), nodes


def refit_of(way: str, name: str, limit_s: float = WAIT_S) -> Refit:
    both, plan, _ = planned(name)
    held = wire.storages(both[0], wire.quantized(both[0], wire.random_tensors(both[0])))
    return Refit(way, both, plan, held, wire.storages(both[1], None), limit_s)


def ways(names: Any) -> list[tuple[str, str]]:
    written = [n for n in names if not unwritable(planned(n)[1].copies)]
    return [("grouped", n) for n in written] + [("buckets", n) for n in names]


# --- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_each_node_is_fed_once_and_every_copy_arrives(name: str) -> None:
    both, plan, nodes = planned(name)
    direct = build_plan(*both, exchange_amax=True)
    unmarked = [replace(copy, via=None, onward=()) for copy in plan.copies]
    assert unmarked == list(direct.copies)
    fed: Counter[Any] = Counter()
    for rank in both[1].ranks:
        for copy in plan.fed(rank):
            fed[nodes[rank], copy.tensor, copy.start, copy.shape] += 1
    most = Counter((c.destination_rank, c.tensor, c.start, c.shape) for c in direct.copies)
    for (node, *rect), count in fed.items():  # a tied tensor is wanted twice by one rank
        assert count == max(most[(r, *rect)] for r in nodes if nodes[r] == node)
    for rank in both[1].ranks:
        taken = [c for other in nodes for c in handed_on(plan, other, rank)]
        assert len(taken) + len(plan.fed(rank)) == len(direct.to_rank(rank))
        assert all(nodes[c.source_rank] == nodes[rank] for c in taken)


@pytest.mark.parametrize("name", CASES)
def test_a_worker_finds_the_same_from_its_own_copies(name: str) -> None:
    """It knows its boxes and who else wants what they hold; what it hands on and takes is then the same."""
    both, plan, nodes = planned(name)
    sharers = shared(build_plan(*both, exchange_amax=True), nodes)
    for rank, boxes in both[1].ranks.items():
        mine = build_plan(both[0], Manifest(both[1].tensors, {rank: boxes}), exchange_amax=True)
        told = from_runs(as_runs(sharers[rank]))
        alone = with_forwarding(mine, {rank: told})
        assert alone.to_rank(rank) == plan.to_rank(rank)
        assert alone.digest(rank) == plan.digest(rank)
        assert alone.digest(rank) != mine.digest(rank)
        for other in nodes:
            for route in ((rank, other), (other, rank)):
                here, there = handed_on(alone, *route), handed_on(plan, *route)
                assert [(c.tensor, c.start, c.shape, c.dtype) for c in here] == [
                    (c.tensor, c.start, c.shape, c.dtype) for c in there
                ]


@pytest.mark.parametrize("name", ["engines2", "tp2.engines2", "fsdp3-cut-blocks"])
def test_workers_share_the_handing_on(name: str) -> None:
    _, plan, _ = planned(name)
    load: Counter[int] = Counter()
    for copy in plan.copies:
        if copy.onward:
            load[copy.destination_rank] += copy.weight_bytes + copy.scale_bytes
    largest = max(c.weight_bytes for c in plan.copies)
    assert max(load.values()) - min(load.values()) <= largest


@pytest.mark.parametrize("name", CASES)
def test_the_forecast_counts_what_the_plan_forwards(name: str) -> None:
    """To the byte in and between nodes; who of a node is first is dealt out evenly, so by a copy or so."""
    both, plan, nodes = planned(name)
    found = traffic(side_of(both[0]), side_of(both[1]), gpus_per_node=CASES[name][1])
    fed: Counter[int] = Counter()
    forwards: Counter[tuple[int, int]] = Counter()
    for copy in plan.copies:
        nbytes = copy.weight_bytes + copy.scale_bytes
        if copy.via is None:
            fed[nodes[copy.destination_rank]] += nbytes
        else:
            forwards[copy.via, copy.destination_rank] += nbytes
    counted: Counter[int] = Counter()
    for (_, rank), nbytes in found.fed.items():
        counted[nodes[rank]] += nbytes
    assert counted == fed
    assert sum(found.forwards.values()) == sum(forwards.values())
    assert found.forwards.keys() == forwards.keys()
    largest = max(c.weight_bytes + c.scale_bytes for c in plan.copies)
    for route, nbytes in forwards.items():
        assert abs(nbytes - found.forwards[route]) <= 2 * largest


# --- the bytes ------------------------------------------------------------------------------------


class Counting:
    """A trainer rank's or a worker's group, and how many bytes it sends to whom."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.sent: Counter[int] = Counter()

    def exchange(self, sends: Any, receives: Any) -> Any:
        for message, peer in sends:
            self.sent[peer] += message.numel() - HEADER_BYTES
        return self._group.exchange(sends, receives)

    def send(self, message: torch.Tensor, to: int) -> None:
        self.sent[to] += message.numel() - HEADER_BYTES
        self._group.send(message, to)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def groups_of(refit: Refit, wrap: Callable[[Any], Any]) -> tuple[list[Any], dict[int, Any]]:
    """Put a wrapper around every member's group; returns the trainer's and the workers'."""
    for sender in refit.senders:
        sender._group = wrap(sender._group)
    for receiver in refit.receivers.values():
        set_group(receiver, wrap(receiver._group))
    return [s._group for s in refit.senders], {n: r._group for n, r in refit.receivers.items()}


def set_group(receiver: Any, group: Any) -> None:
    receiver._group = group
    if hasattr(receiver, "_relay"):
        receiver._relay._group = group


@pytest.mark.parametrize(("way", "name"), ways(CASES))
def test_every_byte_arrives_and_each_node_is_fed_once(way: str, name: str) -> None:
    refit = refit_of(way, name)
    trainers, workers = groups_of(refit, Counting)
    for version in (1, 2):
        sent, raised = refit.run(version)
        assert not [s.error for s in sent if s.error]
        assert raised == [None] * len(raised)
        assert refit.forward(version) == [None] * len(raised)
        assert not wire.differing(refit.destination, refit.wanted())
    _, plan, nodes = planned(name)
    first = len(trainers)  # of the workers' numbers
    fed = sum((group.sent for group in trainers), Counter())
    for node in set(nodes.values()):
        once = sum(
            copy.weight_bytes + copy.scale_bytes
            for rank in nodes
            if nodes[rank] == node
            for copy in plan.fed(rank)
        )
        into = sum(fed[first + rank] for rank in nodes if nodes[rank] == node) // 2
        assert once <= into < 1.02 * once + 20_000  # padding
    everything = sum(c.weight_bytes + c.scale_bytes for c in plan.copies)
    assert sum(fed.values()) // 2 < everything
    for rank, group in workers.items():
        for other in nodes:
            whole = sum(c.weight_bytes + c.scale_bytes for c in handed_on(plan, rank, other))
            assert whole <= group.sent[first + other] // 2 <= 1.02 * whole + 20_000
            assert whole == 0 or nodes[rank] == nodes[other]


# --- what goes wrong ------------------------------------------------------------------------------


def of(errors: list[BaseException | None], kind: type) -> str:
    return " ".join(str(error) for error in errors if isinstance(error, kind))


@pytest.fixture(params=["grouped", "buckets"])
def two(request: pytest.FixtureRequest) -> Any:
    """Two replicas that have what the trainer sent; afterwards the next version is whole."""
    refit = refit_of(request.param, "engines2")
    assert refit.run(1)[1] == [None, None]
    yield refit
    set_group(refit.receivers[0], refit.receivers[0]._group._group)
    assert refit.run(2)[1] == [None, None]
    assert refit.forward(2) == [None, None]
    assert not wire.differing(refit.destination, refit.wanted())


@pytest.mark.parametrize(
    ("byte", "field"),
    [(64 + 99, "digest"), (12, "index"), (16, "version"), (24, "payload_bytes"), (40, "plan")],
)
def test_a_changed_byte_between_workers(two: Refit, byte: int, field: str) -> None:
    def flip(count: int, message: torch.Tensor) -> None:
        if count == 1:
            message[byte] ^= 0x10

    set_group(two.receivers[0], Meddler(two.receivers[0]._group, flip))
    text = of(two.forward(1), CorruptBucket)
    assert re.search(rf"engine rank 1, bucket \d+.*: {field} expected", text)


def test_a_forwarder_that_cannot_read_its_staging_memory(two: Refit) -> None:
    """It says so, and the other worker hears at once that nothing will come."""
    set_group(two.receivers[0], Meddler(two.receivers[0]._group, lambda *_: None))
    held, two.destination[0] = two.destination[0], {"another": torch.zeros(1)}
    began = time.monotonic()
    raised = two.forward(1)
    assert time.monotonic() - began < WAIT_S / 2
    two.destination[0] = held
    assert raised[0] is not None
    assert "engine rank 0 stopped forwarding" in of(raised[1:], PeerFailed)


@pytest.mark.parametrize("way", ["grouped", "buckets"])
def test_a_forwarder_that_falls_silent_is_named(way: str) -> None:
    refit = refit_of(way, "engines2", limit_s=2.5)
    assert refit.run(1)[1] == [None, None]
    set_group(refit.receivers[0], Late(refit.receivers[0]._group, 6.0))
    began = time.monotonic()
    raised = refit.forward(1)
    assert time.monotonic() - began < 20
    text = of(raised[1:], TransferTimeout) + of(raised[1:], EngineLost)
    assert re.search(
        r"engine rank 0 (did not (send|take|forward) a bucket within 2\.5 s|is gone)", text
    )


# --- where it is done -----------------------------------------------------------------------------


def seat(node: str, gpu: str = "", host: str = "h") -> Seat:
    return Seat(host, gpu, node)


def test_nodes_are_fed_once_where_that_is_less_wire_time() -> None:
    plan = build_plan(*sides(CASES["engines4-two-nodes"][0]))
    two_nodes = {rank: seat("ab"[rank // 2]) for rank in range(4)}
    far = [seat("t"), seat("u")]
    found = choose_feeding("auto", plan, far, two_nodes, 10_000)
    assert found.nodes == {0: "a", 1: "a", 2: "b", 3: "b"}
    assert re.match(
        r"[\d,]+ bytes are forwarded, each node being fed once: .* instead of", found.reason
    )
    assert {c.via for c in found.plan.copies} == {None, 0, 1, 2, 3}

    apart = choose_feeding("auto", plan, far, {r: seat(str(r)) for r in range(4)}, 10_000)
    assert apart.nodes == {}
    assert apart.plan is plan
    assert "no two engine ranks of a node want the same" in apart.reason


def test_nothing_is_forwarded_where_it_brings_nothing() -> None:
    """Two trainer replicas beside two workers: each feeds one at the same speed as the workers would."""
    plan = build_plan(*sides(Case(QWEN, T(dp=2), E(engines=2))))
    near = choose_feeding("nccl", plan, [seat("n")] * 2, {0: seat("n"), 1: seat("n")}, 1 << 20)
    assert near.nodes == {}
    assert re.match("nothing is forwarded: feeding each node once would take", near.reason)


@pytest.mark.parametrize(
    ("transport", "gpu", "why"),
    [
        ("ipc", "x", "trainers write into the memory of every worker"),
        ("auto", "x", "trainers write into the memory of every worker"),
        ("golden", "", "golden sends every tensor to every worker"),
    ],
)
def test_ways_that_forward_nothing_say_why(transport: str, gpu: str, why: str) -> None:
    plan = build_plan(*sides(CASES["engines2"][0]))
    members = {0: seat("n", gpu), 1: seat("n", gpu)}
    found = choose_feeding(transport, plan, [seat("n", gpu)], members, 10_000)
    assert found.plan is plan
    assert why in found.reason


def test_the_node_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NODE_VARIABLE, raising=False)
    host = Seat.at(torch.device("cpu"))
    assert host.node == host.host == node_id()
    monkeypatch.setenv(NODE_VARIABLE, "rack 3")
    assert Seat.at(torch.device("cpu")) == Seat(host.host, "", "rack 3")
