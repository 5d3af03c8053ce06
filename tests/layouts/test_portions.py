"""A version in portions: together they bring every byte, and each is refused in another's place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8sync.engines.vllm.buckets import BucketReceiver
from fp8sync.engines.vllm.grouped import GroupReceiver
from fp8sync.engines.vllm.intake import Intake
from fp8sync.layouts import manifest
from fp8sync.plan import build_plan, in_portions, order_of
from fp8sync.recipe import Formula
from fp8sync.sending.exchange import open_exchange
from fp8sync.sending.grouped import GroupSender
from fp8sync.sending.sender import Sender
from fp8sync.sending.share import Share
from fp8sync.transport import GlooGroup, Invitation
from fp8sync.transport.nccl import NcclGroup
from tests.layouts import wire
from tests.layouts.cases import PAIRS

BUCKET_BYTES = 1 << 14
CPU = torch.device("cpu")
CASE = PAIRS["moe-ep2-ep2"]
SOURCE, DESTINATION = manifest(CASE.trainer, CASE.model), manifest(CASE.engine, CASE.model)
PLAN = build_plan(SOURCE, DESTINATION)
STORAGES = {
    rank: list(dict.fromkeys(box.at.storage for box in boxes))
    for rank, boxes in DESTINATION.ranks.items()
}
PORTIONS = {
    rank: [names[first :: 3 + rank] for first in range(3 + rank)]
    for rank, names in STORAGES.items()
}
"""Three of one worker, four of the other."""
PLANS = in_portions(PLAN, PORTIONS)


def test_portions_are_the_plan_in_its_order() -> None:
    assert len(PLANS) == 4
    for number, plan in enumerate(PLANS):
        wanted = [
            copy
            for copy in PLAN.copies
            if copy.at.storage in dict(enumerate(PORTIONS[copy.destination_rank])).get(number, ())
        ]
        assert list(plan.copies) == wanted
    assert sum(len(plan.copies) for plan in PLANS) == len(PLAN.copies)
    assert {len(plan.to_rank(0)) > 0 for plan in PLANS[:3]} == {True}
    assert not PLANS[3].to_rank(0)


def test_one_portion_is_the_plan_itself() -> None:
    assert in_portions(PLAN, {}) == (PLAN,)
    assert in_portions(PLAN, {0: [], 1: [STORAGES[1]]}) == (PLAN,)


def test_the_digest_tells_portions_apart() -> None:
    assert len({plan.digest(1) for plan in (PLAN, *PLANS)}) == 5


class Members:
    """All members of a link in this process, each in a thread, with a way for every portion."""

    def __init__(self, kind: str) -> None:
        tensors = wire.random_tensors(SOURCE)
        self.held = wire.storages(SOURCE, wire.quantized(SOURCE, tensors))
        self.found = wire.storages(DESTINATION, None)
        self.wanted = wire.storages(DESTINATION, wire.quantized(DESTINATION, tensors))
        peers = {("trainer", 1): "trainer rank 1"}
        peers |= {("engine", r): f"engine rank {r}" for r in DESTINATION.ranks}
        sizes = {"bucket_bytes": BUCKET_BYTES, "forward_bytes": 0}
        orders = [order_of(plan, DESTINATION.ranks, BUCKET_BYTES) for plan in PLANS]
        about = peers, {}, sizes, "gloo", orders
        invitation = Invitation("gloo", "127.0.0.1", 20.0, *about)

        def senders(rank: int) -> Any:
            live: Any = SimpleNamespace(storages=lambda: self.held[rank])
            exchange = open_exchange((), rank, CPU, lambda _: pytest.fail("no team is needed"))
            shares = [
                Share(live, rank, SOURCE, plan, 20.0, exchange, portion=n)
                for n, plan in enumerate(PLANS)
            ]
            way: Any = {"gloo": Sender, "nccl": GroupSender}[kind]
            return way.open(invitation.to("trainer", rank), shares)

        def receivers(rank: int) -> Any:
            channel: Any = SimpleNamespace(timeout_s=20.0)
            about = channel, None, SOURCE, DESTINATION
            intakes = [Intake(*about, plan, rank, CPU) for plan in PLANS]
            way: Any = {"gloo": BucketReceiver, "nccl": GroupReceiver}[kind]
            return way.open(invitation.to("engine", rank), intakes)

        self._pool = ThreadPoolExecutor(4)
        opened = [self._pool.submit(senders, rank) for rank in SOURCE.ranks]
        entered = [self._pool.submit(receivers, rank) for rank in DESTINATION.ranks]
        self.senders = [future.result() for future in opened]
        self.receivers = [future.result() for future in entered]

    def run(self, sent: int, taken: int) -> list[BaseException | None]:
        """Send one portion while another is expected; returns what workers raised."""
        sending = [self._pool.submit(own[sent].send, 1, lambda _: None) for own in self.senders]
        taking = [
            self._pool.submit(own[taken].receive, 1, self.found[rank])
            for rank, own in enumerate(self.receivers)
        ]
        raised = [future.exception(30) for future in taking]
        assert not [f.result(30).error for f in sending if f.result(30).error]
        return raised


@pytest.mark.parametrize("kind", ["gloo", "nccl"])
def test_every_byte_arrives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nccl` is the code of that way, its messages carried by gloo."""
    monkeypatch.setattr(
        NcclGroup, "join", lambda choice, _, limit_s: GlooGroup.join(choice, limit_s)
    )
    members = Members(kind)
    for number in range(len(PLANS)):
        assert wire.differing(members.found, members.wanted)
        assert members.run(number, number) == [None, None]
    assert not wire.differing(members.found, members.wanted)
    if kind == "nccl":
        for ways in (*members.senders, *members.receivers):
            starts = {
                m.data_ptr() for way in ways for turn in way._turns for m in turn.messages[:1]
            }
            assert len(starts) == 2


@pytest.mark.parametrize("formula", Formula)
def test_written_one_sided(formula: Formula) -> None:
    engine = replace(CASE.engine, formula=CASE.engine.formula and formula)
    destination = manifest(engine, CASE.model)
    tensors = wire.random_tensors(SOURCE)
    held = wire.storages(SOURCE, wire.quantized(SOURCE, tensors))
    wanted = wire.storages(destination, wire.quantized(destination, tensors))
    for number, plan in enumerate(in_portions(build_plan(SOURCE, destination), PORTIONS)):
        found = wire.storages(destination, None)
        assert not wire.write_out(plan, held, found)
        for rank, portions in PORTIONS.items():
            for name in portions[number] if number < len(portions) else ():
                assert torch.equal(wire.bits(found[rank][name]), wire.bits(wanted[rank][name]))
