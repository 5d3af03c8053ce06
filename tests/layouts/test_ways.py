"""The ways that go through a group, between real members of one: every pair of layouts, every byte.

`grouped` is what runs over NCCL on GPUs, turn by turn; gloo carries it here. `golden` is the oracle that
looks at no copy of the plan.
"""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8sync.engines.vllm.golden import GoldenReceiver
from fp8sync.engines.vllm.grouped import GroupReceiver
from fp8sync.engines.vllm.receive import Intake
from fp8sync.errors import CorruptBucket
from fp8sync.exchange import open_exchange
from fp8sync.golden import GoldenSender
from fp8sync.grouped import BUFFERS, GroupSender
from fp8sync.layouts import manifest
from fp8sync.outgoing import Share
from fp8sync.plan import Plan, build_plan
from fp8sync.recipe import Formula
from fp8sync.tables import unwritable
from fp8sync.transport import GlooGroup, Invitation
from fp8sync.wire import HEADER_BYTES
from tests.layouts import wire
from tests.layouts.cases import PAIRS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp8sync.manifest import Manifest

BUCKET_BYTES = 60_000
CPU = torch.device("cpu")
WAIT_S = 20.0


class Team:
    """Trainer ranks, each in a thread of this process, that take a maximum together."""

    def __init__(self, size: int) -> None:
        self._met = threading.Barrier(size, timeout=WAIT_S)
        self._shares: list[torch.Tensor] = []

    def maximum(self, values: torch.Tensor) -> None:
        self._shares.append(values)
        self._met.wait()
        joint = torch.stack(self._shares).amax(0)
        self._met.wait()
        values.copy_(joint)
        self._shares.clear()


class Refit:
    """All members of a refit in this process, each in a thread."""

    def __init__(
        self,
        way: str,
        sides: tuple[Manifest, Manifest],
        plan: Plan,
        source: wire.Ranks,
        destination: wire.Ranks,
    ) -> None:
        self.destination = destination
        self._teams: dict[tuple[int, ...], Team] = {}
        trainers, workers = list(source), list(destination)
        peers = {("trainer", r): f"trainer rank {r}" for r in trainers if r}
        peers |= {("engine", r): f"engine rank {r}" for r in workers}
        invitation = Invitation("gloo", "127.0.0.1", WAIT_S, peers, {}, BUCKET_BYTES, "gloo")
        members = dict(invitation.to("trainer", 0)["members"])
        self.pool = ThreadPoolExecutor(len(trainers) + len(workers))

        def group(role: str, rank: int) -> GlooGroup:
            return GlooGroup.join(invitation.to(role, rank), WAIT_S)

        def sender(rank: int) -> GroupSender | GoldenSender:
            held = SimpleNamespace(storages=lambda: source[rank])
            exchange = open_exchange(plan.amax, rank, CPU, self._team)
            share = Share(held, rank, sides[0], plan, WAIT_S, exchange)
            joined = group("trainer", rank)
            if way == "golden":
                return GoldenSender(share, joined, CPU, list(members.values()))
            return GroupSender(share, joined, members, BUCKET_BYTES)

        def receiver(rank: int) -> GroupReceiver | GoldenReceiver:
            intake = Intake(None, None, *sides, plan, rank, CPU)
            joined = group("engine", rank)
            if way == "golden":
                return GoldenReceiver(intake, joined, CPU)
            return GroupReceiver(intake, joined, BUCKET_BYTES)

        senders = [self.pool.submit(sender, rank) for rank in trainers]
        receivers = [self.pool.submit(receiver, rank) for rank in workers]
        self.senders = [f.result() for f in senders]
        self.receivers = dict(zip(workers, (f.result() for f in receivers), strict=True))

    def _team(self, ranks: tuple[int, ...]) -> Team:
        return self._teams.setdefault(ranks, Team(len(ranks)))

    def run(self, version: int) -> tuple[list[Any], list[BaseException | None]]:
        """What each trainer rank sent, and what each worker raised."""
        sent = [self.pool.submit(s.send, version, lambda _: None) for s in self.senders]
        taken = [
            self.pool.submit(r.receive, version, self.destination[rank])
            for rank, r in self.receivers.items()
        ]
        return [f.result() for f in sent], [f.exception() for f in taken]


def writable(name: str) -> bool:
    case = PAIRS[name]
    source, destination = manifest(case.trainer, case.model), manifest(case.engine, case.model)
    return not unwritable(build_plan(source, destination, exchange_amax=True).copies)


CASES = [("grouped", name) for name in PAIRS if writable(name)]
CASES += [("golden", name) for name in PAIRS if not PAIRS[name].misc]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_bytes_are_those_of_the_whole_tensor(way: str, name: str) -> None:
    case = PAIRS[name]
    formula = Formula.POW2
    trainer = replace(case.trainer, pairs=case.trainer.pairs and formula)
    engine = replace(case.engine, formula=case.engine.formula and formula)
    source, destination = manifest(trainer, case.model), manifest(engine, case.model)
    plan = build_plan(source, destination, exchange_amax=True)
    tensors = wire.random_tensors(source)
    held = wire.storages(source, wire.quantized(source, tensors))
    found = wire.storages(destination, None)
    sent, raised = Refit(way, (source, destination), plan, held, found).run(1)
    assert not [s.error for s in sent if s.error]
    assert raised == [None] * len(raised)
    wanted = wire.quantized(destination, tensors)
    assert not wire.differing(found, wire.storages(destination, wanted))


class Meddler:
    """A member's group, with something done to what it sends."""

    def __init__(self, group: Any, change: Callable[[int, torch.Tensor], None]) -> None:
        self._group, self._change, self._count = group, change, 0

    def exchange(self, sends: Any, receives: Any) -> Any:
        for message, _ in sends:
            self._change(self._count, message)
            self._count += 1
        return self._group.exchange(sends, receives)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


@pytest.fixture(params=["grouped", "golden"])
def refit(request: pytest.FixtureRequest) -> Iterator[Refit]:
    """Two trainer ranks and two workers; what a test leaves behind, the next version replaces."""
    case = PAIRS["moe-ep2-ep2"]
    source, destination = manifest(case.trainer, case.model), manifest(case.engine, case.model)
    held = wire.storages(source, wire.quantized(source, wire.random_tensors(source)))
    found = wire.storages(destination, None)
    plan = build_plan(source, destination)
    refit = Refit(request.param, (source, destination), plan, held, found)
    yield refit
    refit.senders[0]._group = getattr(refit.senders[0]._group, "_group", None)
    sent, raised = refit.run(9)
    assert not [s.error for s in sent if s.error]
    assert raised == [None, None]
    wanted = wire.quantized(destination, wire.random_tensors(source))
    assert not wire.differing(found, wire.storages(destination, wanted))


def meddle(refit: Refit, change: Callable[[int, torch.Tensor], None]) -> list[BaseException | None]:
    refit.senders[0]._group = Meddler(refit.senders[0]._group, change)
    return refit.run(1)[1]


@pytest.mark.parametrize("refit", ["grouped"], indirect=True)
def test_there_are_more_turns_than_buffers(refit: Refit) -> None:
    assert all(len(s._turns) > 2 * BUFFERS for s in refit.senders)
    meddle(refit, lambda count, message: None)


@pytest.mark.parametrize(
    ("byte", "field"),
    [(64 + 99, "digest"), (12, "index"), (16, "version"), (24, "payload_bytes"), (40, "plan")],
)
def test_a_changed_byte(refit: Refit, byte: int, field: str) -> None:
    def flip(count: int, message: torch.Tensor) -> None:
        if count == 2:
            message[byte] ^= 0x10

    raised = meddle(refit, flip)
    assert {type(error) for error in raised if error} == {CorruptBucket}
    assert f": {field} expected" in str(next(filter(None, raised)))


def test_messages_out_of_order(refit: Refit) -> None:
    kept: dict[int, torch.Tensor] = {}

    def swap(count: int, message: torch.Tensor) -> None:
        kept[count] = message.clone()
        if count == 4:
            message[:HEADER_BYTES] = kept[2][:HEADER_BYTES]

    raised = meddle(refit, swap)
    assert re.search(r"index expected \d+, found \d+", str(next(filter(None, raised))))


def test_weights_that_cannot_be_read(refit: Refit) -> None:
    """Workers get every bucket all the same, so that nobody is left waiting."""
    source = refit.senders[0]._share.source
    storages = source.storages

    def fail() -> None:
        source.storages = storages
        raise RuntimeError("freed")

    source.storages = fail
    sent, raised = refit.run(1)
    assert "trainer rank 0 failed: RuntimeError: freed" in str(sent[0].error)
    assert {str(error) for error in raised} == {"trainer rank 0 stopped sending"}
    refit.senders[0]._group = Meddler(refit.senders[0]._group, lambda *_: None)
