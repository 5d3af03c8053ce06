"""Refits from announcement to commit, between the real members of a link, each in a thread of this process.

By `ipc` memory is the processor's, so it is mapped by being there; all else is what runs between GPUs.
"""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed

from fp8sync.errors import (
    CorruptBucket,
    EngineLost,
    Fp8SyncError,
    NonFiniteWeight,
    TensorMismatch,
    TransferTimeout,
)
from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.link.conductor import Conductor
from fp8sync.sending.sender import Sender
from fp8sync.sending.share import Share
from fp8sync.sending.writer import PARTS, Writer
from fp8sync.transport import GlooGroup
from fp8sync.transport.nccl import NcclGroup
from fp8sync_kernels import run_table
from scripts.bench import refit_world
from tests.layouts.cases import QWEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from fp8sync.sending.share import Written

dist: Any = torch.distributed
CPU = torch.device("cpu")
SOURCE, WANTED = manifest(TrainerLayout(tp=2), QWEN), manifest(EngineLayout(tp=2), QWEN)
WAIT_S = 20.0
LAST = PARTS - 1


class Worker(refit_world.Worker):
    """Keeps one staging memory for all versions, as on a GPU."""

    @property
    def staged(self) -> refit_world.Tensors:
        (specs,) = self._staging._portions
        return {name: self._staging._view(name, spec) for name, spec in specs.items()}

    def take(self) -> None:
        """One version, to the vote, and through the commit if there is one."""
        channel = self._channel
        self._vote(self._receiver.receive, int(channel.receive("version")["version"]))
        channel.receive("prepare")
        channel.send({"type": "vote", "error": None})
        if channel.receive("decision")["commit"]:
            self._committed()


class Refit:
    """Two trainer ranks and two workers."""

    def __init__(self, way: str) -> None:
        self._store, self._way = dist.HashStore(), way
        self._links = 0
        self.held = [refit_world.allocated(SOURCE, rank, CPU) for rank in (0, 1)]
        self.expected = [refit_world.allocated(WANTED, rank, CPU) for rank in (0, 1)]
        for rank in (0, 1):
            refit_world.fill(SOURCE, rank, self.held[rank])
            refit_world.fill(WANTED, rank, self.expected[rank])
        self.workers = [Worker(refit_world.own(WANTED, rank), rank, CPU) for rank in (0, 1)]
        self._pool = ThreadPoolExecutor(3)
        self.version = 0
        self.stages: list[dict[str, float]] = []
        self.connect()

    def connect(self) -> None:
        """Make a link, in the place of one that may be broken."""
        self._links += 1
        key = str(self._links)
        sources = [
            refit_world.PaperSource(refit_world.own(SOURCE, rank), self.held[rank])
            for rank in (0, 1)
        ]
        joining = [self._pool.submit(w.join, self._store, key) for w in self.workers]
        following = self._pool.submit(refit_world.follow, sources[1], 1, self._store, key)
        self.leader = refit_world.lead(sources[0], self._store, key, self._way, (2, 2), 1 << 15)
        self.follower = following.result()
        assert [each.result() for each in joining] == [None, None]

    def run(self, heard: threading.Event | None = None) -> list[BaseException | None]:
        """One version; what rank 0, rank 1 and the workers raised. Sets `heard` when rank 0 is through."""
        self.version += 1
        others: list[Future[Any]] = [self._pool.submit(self.follower.transfer)]
        others += [self._pool.submit(worker.take) for worker in self.workers]
        raised: BaseException | None = None
        try:
            refit_world.timed_refit(self.leader, self.version, self.stages)
        except Fp8SyncError as error:
            raised = error
        if self.leader.hung_up:
            self.leader.close()
        if heard is not None:
            heard.set()
        return [raised, *(each.exception(WAIT_S) for each in others)]

    def mend(self) -> None:
        """Connect anew where somebody was lost, as `Link.refit` does, and meddle no more."""
        if self.leader.hung_up:
            self.follower.close()
            for worker in self.workers:
                worker.leave()
            self.connect()
        vars(self.follower).pop("_tell", None)

    def arrived(self) -> bool:
        """Whether every worker holds every byte."""
        pairs = zip(self.workers, self.expected, strict=True)
        return not any(refit_world.differing(worker.staged, wanted) for worker, wanted in pairs)

    def tells(self, tell: Callable[[int, Written | None], list[Written | None]]) -> None:
        """Let rank 1, once, say what `tell` makes of the number of a part and what it has written."""
        before = self.follower._tell
        number = iter(range(PARTS))

        def told(written: Written | None) -> None:
            for each in tell(next(number), written):
                before(each)

        self.follower._tell = told

    def close(self) -> None:
        self.leader.close()
        self.follower.close()
        for worker in self.workers:
            worker.leave()
        self._pool.shutdown()


@pytest.fixture
def refit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Refit]:
    """By `ipc`, or as a test asks. Afterwards the next version arrives, over a new link if this one is down."""
    way = getattr(request, "param", "ipc")
    choose = "fp8sync.link.conductor.choose_transport"
    monkeypatch.setattr(choose, lambda *_: (way, "asked for"))
    monkeypatch.setattr(refit_world, "TIMEOUT_S", WAIT_S)
    store = dist.HashStore()

    def join(choice: Any, _: Any, limit_s: float) -> GlooGroup:
        """Gloo carries `nccl`'s messages, in the order that rank 0 makes, as there is no GPU."""
        assert [len(order) > 2 for order in choice["orders"]] == [True]
        return GlooGroup(store, choice["rank"], len(choice["names"]), "127.0.0.1", limit_s)

    monkeypatch.setattr(NcclGroup, "join", join)
    monkeypatch.setattr("fp8sync.transport.invitation.new_unique_id", lambda **_: "")
    refit = Refit(way)
    yield refit
    for worker in refit.workers:
        for tensor in worker.staged.values():
            tensor.zero_()
    refit.mend()
    assert refit.run() == [None] * 4
    assert refit.arrived()
    refit.close()


both_ways = pytest.mark.parametrize("refit", ["ipc", "nccl"], indirect=True)


@both_ways
def test_every_byte_of_every_version(refit: Refit) -> None:
    assert refit.run() == [None] * 4
    assert refit.arrived()
    (stages,) = refit.stages
    assert {"quantize", "send", "verify"} <= set(stages)


@both_ways
def test_a_weight_that_is_not_a_number(refit: Refit) -> None:
    """Where rank 1 alone holds it."""
    (storage,) = (x for name, x in refit.held[1].items() if "down_proj" in name)
    kept = storage.clone()
    storage.view(-1)[7] = float("nan")
    first, *others = refit.run()
    storage.copy_(kept)
    assert isinstance(first, NonFiniteWeight)
    name = "model.layers.0.mlp.down_proj.weight"
    expected = f"{name} (trainer rank 1): expected finite values, found 1 NaN or Inf"
    assert first.violations == (expected,)
    assert [str(error) for error in others] == [str(first), "None", "None"]


def lie_otherwise(refit: Refit, how: str = "moved") -> tuple[str, torch.Tensor, str]:
    """Change how a weight of rank 1 alone lies; its name, what it was, and what is to be said."""
    name, kept = next((n, x) for n, x in refit.held[1].items() if "down_proj" in n)
    ways = {"moved": lambda: torch.stack([kept, kept], 1)[:, 0], "in place": lambda: kept[::2]}
    other = refit.held[1][name] = ways.get(how, kept.clone)()
    if how == "freed":
        other.untyped_storage().resize_(0)
        return name, kept, f"{name}: expected data, found freed memory"
    expected = f"{name}: expected bfloat16 {tuple(kept.shape)} with strides (1,)"
    return name, kept, f"{expected}, found bfloat16 {tuple(other.shape)} with strides (2,)"


@pytest.mark.parametrize("refit", ["ipc", "nccl", "gloo", "golden"], indirect=True)
@pytest.mark.parametrize("how", ["moved", "in place", "freed"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_weight_that_lies_otherwise_than_at_connect(refit: Refit, after: int, how: str) -> None:
    """Also where it came to between connecting and the first refit."""
    for _ in range(after):
        assert refit.run() == [None] * 4
    name, kept, text = lie_otherwise(refit, how)
    first, *others = refit.run()
    refit.held[1][name] = kept
    assert isinstance(first, TensorMismatch)
    where = "lie otherwise than when the link was made; close the link (`fp8sync.close` where"
    where = "hold no data; bring it back" if how == "freed" else where
    assert first.summary.startswith(f"weights of trainer rank 1 {where}")
    assert text in first.violations
    assert type(others[0]) is TensorMismatch


@pytest.mark.parametrize("refit", ["gloo"], indirect=True)
def test_an_audit_of_a_weight_that_lies_otherwise(refit: Refit) -> None:
    """It would find the bytes that a refit that read them wrong had sent, and call them equal."""
    member = refit.follower._member
    assert member.ledger().digests()
    name, kept, text = lie_otherwise(refit)
    with pytest.raises(TensorMismatch) as refusal:
        member.ledger()
    refit.held[1][name] = kept
    assert refusal.value.violations == (text,)


@pytest.mark.parametrize("refit", ["gloo"], indirect=True)
def test_a_weight_of_a_later_portion_is_refused_with_the_first(
    refit: Refit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the first has nothing in it; once it is installed, a refusal would come too late."""
    member: Any = refit.follower._member
    none = Share(member.source, 1, SOURCE, member.plan, WAIT_S, member._exchange)
    name, kept, text = lie_otherwise(refit)
    with monkeypatch.context() as patch:
        patch.setattr(member, "_senders", [Sender(none, member._senders[0]._group, {}, 1)])
        patch.setattr(member, "_later", member.plan.copies)
        error = member.send(1, 0, lambda _: None).error
    refit.held[1][name] = kept
    assert isinstance(error, TensorMismatch)
    assert error.violations == (text,)


def test_a_flipped_byte(refit: Refit) -> None:
    """Changed in staging memory after all was written, and before the worker looks at the largest part."""

    def flip(number: int, written: Written | None) -> list[Written | None]:
        if number == PARTS // 2:
            for tensor in refit.workers[1].staged.values():
                tensor.view(torch.uint8)[-1] ^= 1
        return [written]

    refit.tells(flip)
    first, *others = refit.run()
    assert isinstance(first, CorruptBucket)
    assert re.search(
        r"engine rank 1: staged .*: engine rank 1 expected digest", str(first), re.DOTALL
    )
    assert [type(error) for error in others] == [CorruptBucket, type(None), type(None)]


def test_digests_in_another_order(refit: Refit) -> None:
    """Of the right copies, the last part first."""
    kept: list[Written | None] = []

    def turn(number: int, written: Written | None) -> list[Written | None]:
        kept.insert(0, written)
        return kept if number == LAST else []

    refit.tells(turn)
    first, *_ = refit.run()
    assert isinstance(first, CorruptBucket)
    assert re.search(
        r"\.weight: engine rank \d expected digest \S+ from trainer rank 1", str(first)
    )


def test_a_rank_that_cannot_read(refit: Refit) -> None:
    held = dict(refit.held[1])
    refit.held[1].clear()
    first, *others = refit.run()
    refit.held[1].update(held)
    assert "trainer rank 1 failed: KeyError" in str(first)
    assert type(others[0]) is Fp8SyncError


def test_a_launch_that_fails(refit: Refit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between others: of no part that follows do workers hear anything but that it never will come."""
    count = iter(range(100))

    def launch(*args: Any) -> None:
        if next(count) == 3:
            raise RuntimeError("no memory left")
        run_table(*args)

    with monkeypatch.context() as patch:
        patch.setattr("fp8sync.sending.writer.run_table", launch)
        first, *others = refit.run()
    assert re.search(r"trainer rank \d failed: RuntimeError: no memory left", str(first))
    assert type(others[0]) is Fp8SyncError
    assert others[1:] == [None, None]


@pytest.mark.parametrize("part", [0, LAST])
def test_a_rank_that_dies(refit: Refit, part: int) -> None:
    def die(number: int, written: Written | None) -> list[Written | None]:
        if number == part:
            refit.follower.close()
        return [written]

    refit.tells(die)
    first, *_ = refit.run()
    assert isinstance(first, EngineLost)
    assert "trainer rank 1 closed the connection; expected 'written'" in str(first)


def test_a_rank_that_falls_silent(refit: Refit) -> None:
    for channel in refit.leader._peers.each("trainer"):
        channel.timeout_s = 0.5
    heard = threading.Event()

    def wait(number: int, written: Written | None) -> list[Written | None]:
        if number == 1:
            heard.wait(WAIT_S)
        return [written]

    refit.tells(wait)
    first, *_ = refit.run(heard)
    assert isinstance(first, TransferTimeout)
    assert "trainer rank 1 sent no 'written' within 0.5 s" in str(first)


def test_a_worker_that_dies(refit: Refit) -> None:
    def die(number: int, written: Written | None) -> list[Written | None]:
        if number == 1:
            refit.workers[0]._channel.close()
        return [written]

    refit.tells(die)
    first, *_ = refit.run()
    assert isinstance(first, EngineLost)
    assert "engine rank 0 closed the connection; expected 'vote'" in str(first)


def test_a_link_that_is_given_up_while_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 takes longer than its caller waits: what it has opened after all is closed, too."""
    source, wanted = manifest(TrainerLayout(), QWEN), manifest(EngineLayout(), QWEN)
    opening, go = threading.Event(), threading.Event()
    conductors: list[Conductor] = []
    writers: list[Writer] = []

    def make(*about: Any) -> Conductor:
        conductors.append(Conductor(*about))
        return conductors[0]

    def open_late(*about: Any) -> list[Writer]:
        writers.extend(Writer.open(*about))
        opening.set()
        go.wait(WAIT_S)
        return writers

    monkeypatch.setattr(refit_world, "Conductor", make)
    monkeypatch.setattr("fp8sync.link.member.open_senders", open_late)
    monkeypatch.setattr("fp8sync.link.conductor.choose_transport", lambda *_: ("ipc", "asked for"))
    store, worker = dist.HashStore(), Worker(wanted, 0, CPU)
    held = refit_world.PaperSource(source, refit_world.allocated(source, 0, CPU))
    with ThreadPoolExecutor(2) as pool:
        joining = pool.submit(worker.join, store, "late")
        leading = pool.submit(refit_world.lead, held, store, "late", "ipc", (1, 1), 1 << 15)
        assert opening.wait(WAIT_S)
        conductors[0].close()
        assert writers[0]._mapped
        go.set()
        assert isinstance(leading.exception(WAIT_S), EngineLost)
        joining.exception(WAIT_S)
    worker.leave()
    assert [writer._mapped for writer in writers] == [{}]


def test_a_rank_that_makes_another_call(refit: Refit) -> None:
    """It says so in the place of what it has written."""
    refit.follower.transfer = refit.follower.audit
    first, *_ = refit.run()
    assert "trainer rank 1 was asked to audit, but rank 0 to refit" in str(first)
