"""The ways that go through a group, between real members of one: every pair of layouts, every byte.

`grouped` is what runs over NCCL on GPUs, turn by turn; gloo carries it here. `buckets` is what runs over
gloo, one by one. `golden` is the oracle that looks at no copy of the plan.
"""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8sync.engines.vllm.buckets import BucketReceiver
from fp8sync.engines.vllm.golden import GoldenReceiver
from fp8sync.engines.vllm.grouped import GroupReceiver
from fp8sync.engines.vllm.intake import Intake, Receiver
from fp8sync.errors import CorruptBucket, EngineLost, NonFiniteWeight, PeerFailed
from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import Plan, build_plan, order_of
from fp8sync.recipe import Encoding, Formula
from fp8sync.sending.exchange import open_exchange
from fp8sync.sending.golden import GoldenSender
from fp8sync.sending.grouped import GroupSender
from fp8sync.sending.sender import Sender
from fp8sync.sending.share import Outgoing, Share
from fp8sync.sending.turns import BUFFERS
from fp8sync.transport import GlooGroup, Invitation
from fp8sync.wire.header import HEADER_BYTES
from fp8sync.wire.tables import unwritable
from fp8sync_kernels import dequantize_blockwise
from tests.layouts import wire
from tests.layouts.cases import PAIRS, QWEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Change = Callable[[int, torch.Tensor], torch.Tensor | None]

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
        limit_s: float = WAIT_S,
    ) -> None:
        self.destination, self._sides = destination, sides
        self._teams: dict[tuple[int, ...], Team] = {}
        trainers, workers = list(source), list(destination)
        peers = {("trainer", r): f"trainer rank {r}" for r in trainers if r}
        peers |= {("engine", r): f"engine rank {r}" for r in workers}
        invitation = Invitation("gloo", "127.0.0.1", WAIT_S, peers, {}, {}, "gloo")
        members = dict(invitation.to("trainer", 0)["members"])
        self.pool = ThreadPoolExecutor(len(trainers) + len(workers))
        self.left: dict[int, list[int]] = {rank: [] for rank in trainers}
        order = order_of(plan, workers, BUCKET_BYTES)

        def group(role: str, rank: int) -> GlooGroup:
            joined = GlooGroup.join(invitation.to(role, rank), WAIT_S)
            joined._timeout = timedelta(seconds=limit_s)
            return joined

        def sender(rank: int) -> Outgoing:
            held = SimpleNamespace(storages=lambda: source[rank])
            exchange = open_exchange(plan.amax, rank, CPU, self._team)
            share = Share(held, rank, sides[0], plan, WAIT_S, exchange, self.left[rank].append)
            joined = group("trainer", rank)
            if way == "golden":
                return GoldenSender(share, joined, CPU, list(members.values()))
            if way == "grouped":
                return GroupSender(share, joined, members, order, BUCKET_BYTES)
            return Sender(share, joined, members, BUCKET_BYTES)

        def receiver(rank: int) -> Receiver:
            channel = SimpleNamespace(progress=lambda _: None)
            intake = Intake(channel, None, *sides, plan, rank, CPU)
            joined = group("engine", rank)
            if way == "golden":
                return GoldenReceiver(intake, joined, CPU)
            if way == "grouped":
                return GroupReceiver(intake, joined, members, order, BUCKET_BYTES, BUCKET_BYTES)
            return BucketReceiver(intake, joined, members, BUCKET_BYTES)

        senders = [self.pool.submit(sender, rank) for rank in trainers]
        receivers = [self.pool.submit(receiver, rank) for rank in workers]
        self.senders = [f.result() for f in senders]
        self.receivers = dict(zip(workers, (f.result() for f in receivers), strict=True))

    def wanted(self) -> wire.Ranks:
        """What every worker should hold."""
        source, destination = self._sides
        tensors = wire.quantized(destination, wire.random_tensors(source))
        return wire.storages(destination, tensors)

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

    def forward(self, version: int) -> list[BaseException | None]:
        """Let workers hand on; what each of them raised."""
        handed = [
            self.pool.submit(r.forward, version, self.destination[rank])
            for rank, r in self.receivers.items()
        ]
        return [f.exception() for f in handed]


def writable(name: str) -> bool:
    case = PAIRS[name]
    source, destination = manifest(case.trainer, case.model), manifest(case.engine, case.model)
    return not unwritable(
        build_plan(source, destination, exchange_amax=True).copies, in_buckets=True
    )


CASES = [("grouped", name) for name in PAIRS if writable(name)]
CASES += [(way, name) for way in ("buckets", "golden") for name in PAIRS]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_bytes_are_those_of_the_whole_tensor(
    way: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8sync.wire.payload.STRIP_BYTES", 1 << 14)  # so that there are some
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


@pytest.mark.parametrize("way", ["buckets", "golden"])
def test_pairs_that_are_quantized_anew(way: str) -> None:
    trainer, engine = TrainerLayout(tp=2, pairs=Formula.FP32), EngineLayout(formula=Formula.POW2)
    source, destination = manifest(trainer, QWEN), manifest(engine, QWEN)
    plan = build_plan(source, destination, requantize=True)
    pairs = wire.quantized(source, wire.random_tensors(source))
    found = wire.storages(destination, None)
    held = wire.storages(source, pairs)
    sent, raised = Refit(way, (source, destination), plan, held, found).run(1)
    assert [s.error for s in sent] + raised == [None] * 3
    values = {
        name: dequantize_blockwise(x, pairs[name + "_scale_inv"], torch.float32)
        if name + "_scale_inv" in pairs
        else x
        for name, x in pairs.items()
    }
    wanted = wire.quantized(destination, values)
    assert not wire.differing(found, wire.storages(destination, wanted))


@pytest.mark.parametrize("way", ["buckets", "grouped", "golden"])
@pytest.mark.parametrize("formula", [None, Formula.POW2, Formula.FP32])
def test_what_overflows_in_the_engine_is_not_finite(way: str, formula: Formula | None) -> None:
    """A trainer in float32, an engine in float16: 7e4 is infinite there, and found before the commit.

    With a formula it travels as FP8, and the engine decodes it.
    """
    held, found = torch.ones(128, 256), torch.zeros(128, 256, dtype=torch.float16)
    held[3, 5] = 7e4
    boxes = {0: [Box("w", (0, 0), (128, 256), Placement("w", 0, (256, 1)))]}
    sent = TensorInfo("w", (128, 256), "float32")
    taken = TensorInfo("w", (128, 256), "float16")
    if formula:
        taken = TensorInfo("w", (128, 256), "float8_e4m3fn", Encoding.BLOCKWISE, formula)
    source, destination = (Manifest.of([info], boxes) for info in (sent, taken))
    plan = build_plan(source, destination)
    refit = Refit(way, (source, destination), plan, {0: {"w": held}}, {0: {"w": found}})
    (share,), (raised,) = refit.run(1)
    if formula or way == "golden":
        assert isinstance(raised, NonFiniteWeight)
        text = "w (engine rank 0): expected values that are finite in float16, found 1 NaN or Inf"
        assert raised.violations == (text,)
    else:
        assert sum(part.nonfinite for part in share.parts) == 1


class Meddler:
    """A member's group, with something done to what it sends."""

    def __init__(self, group: Any, change: Change) -> None:
        self._group, self._change, self._count = group, change, 0

    def exchange(self, sends: Any, receives: Any) -> Any:
        return self._group.exchange([(self._changed(m), peer) for m, peer in sends], receives)

    def send(self, message: torch.Tensor, to: int) -> None:
        self._group.send(self._changed(message), to)

    def _changed(self, message: torch.Tensor) -> torch.Tensor:
        now = self._change(self._count, message)
        self._count += 1
        return message if now is None else now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


class Late:
    """A member's group, of which nothing is heard for a while."""

    def __init__(self, group: Any, seconds: float) -> None:
        self._group, self._seconds, self._count = group, seconds, 0

    def exchange(self, sends: Any, receives: Any) -> Any:
        self._sleep()
        return self._group.exchange(sends, receives)

    def send(self, message: torch.Tensor, to: int) -> None:
        self._sleep()
        self._group.send(message, to)

    def _sleep(self) -> None:
        self._count += 1
        if self._count == 2:
            time.sleep(self._seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


@pytest.fixture(params=["grouped", "buckets", "golden"])
def refit(request: pytest.FixtureRequest) -> Iterator[Refit]:
    """Two trainer ranks and two workers; what a test leaves behind, the next version replaces."""
    refit = two_and_two(request.param)
    yield refit
    refit.senders[0]._group = getattr(refit.senders[0]._group, "_group", None)
    sent, raised = refit.run(9)
    assert not [s.error for s in sent if s.error]
    assert raised == [None, None]
    assert not wire.differing(refit.destination, refit.wanted())


def two_and_two(way: str, limit_s: float = WAIT_S) -> Refit:
    """Two trainer ranks and two workers, with experts on both."""
    case = PAIRS["moe-ep2-ep2"]
    source, destination = manifest(case.trainer, case.model), manifest(case.engine, case.model)
    held = wire.storages(source, wire.quantized(source, wire.random_tensors(source)))
    found = wire.storages(destination, None)
    return Refit(way, (source, destination), build_plan(source, destination), held, found, limit_s)


def meddle(refit: Refit, change: Change) -> list[BaseException | None]:
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


def test_a_truncated_message(refit: Refit) -> None:
    raised = meddle(refit, lambda count, message: message[:-16] if count == 2 else message)
    errors = [error for error in raised if error]
    assert errors
    assert all(isinstance(error, CorruptBucket) for error in errors), errors
    assert ": digest expected" in str(errors[0])


@pytest.mark.parametrize("way", ["grouped", "buckets"])
def test_a_share_may_take_longer_than_the_limit_of_a_wait(way: str) -> None:
    """Both trainer ranks have more to send than the limit allows, but get rid of one thing after the other."""
    limit_s = 3.5
    refit = two_and_two(way, limit_s)
    slow = refit.senders[0]
    slow._group = Meddler(slow._group, lambda *_: time.sleep(0.15))
    began = time.monotonic()
    sent, raised = refit.run(1)
    assert time.monotonic() - began > 1.2 * limit_s
    assert not [s.error for s in sent if s.error]
    assert raised == [None, None]
    assert not wire.differing(refit.destination, refit.wanted())
    for left in refit.left.values():  # and whoever waits for them hears that they get on
        assert left == sorted(set(left), reverse=True)
        assert len(left) > 2


@pytest.mark.parametrize("side", ["trainer", "engine"])
def test_a_member_that_falls_silent(side: str) -> None:
    """The others name it within the limit, and nobody waits for ever."""
    refit = two_and_two("grouped", limit_s=1.0)
    began = time.monotonic()
    late = refit.senders[0] if side == "trainer" else refit.receivers[0]
    late._group = Late(late._group, 3.0)
    sent, raised = refit.run(1)
    assert time.monotonic() - began < 20
    text = " ".join(str(e) for e in [*(s.error for s in sent), *raised] if e)
    assert re.search(rf"{side} rank 0 (did not (send|take) a bucket within 1 s|is gone)", text)


def test_a_trainer_rank_that_is_gone_does_not_hold_up_the_others() -> None:
    """Workers take on what the other one sends, which would wait for them until its time is over."""
    refit = two_and_two("buckets", limit_s=30.0)
    refit.senders[1]._group = None  # the last reference: its connections are closed
    began = time.monotonic()
    sent = refit.pool.submit(refit.senders[0].send, 1, lambda _: None)
    taken = [
        refit.pool.submit(r.receive, 1, refit.destination[n]) for n, r in refit.receivers.items()
    ]
    assert sent.result().error is None
    for each in taken:
        with pytest.raises(EngineLost, match="trainer rank 1 is gone"):
            each.result()
    assert time.monotonic() - began < 25.0


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
    assert [type(error) for error in raised] == [PeerFailed] * len(raised)
    assert {str(error) for error in raised} == {"trainer rank 0 stopped sending"}
    refit.senders[0]._group = Meddler(refit.senders[0]._group, lambda *_: None)
