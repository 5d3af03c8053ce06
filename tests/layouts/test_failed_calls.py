"""A call to vLLM that fails while a link is made, or a version installed: everyone hears why.

A real link, its follower and workers, in threads of this process; the engine calls the workers, and fails when asked.
"""

from __future__ import annotations

import queue
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed

from fp8sync.control import Listener
from fp8sync.engines.vllm.handle import Handle
from fp8sync.errors import (
    CorruptBucket,
    EngineLost,
    EngineUnusable,
    Fp8SyncError,
    InstallFailed,
    TensorMismatch,
    TransferTimeout,
)
from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.link import connect, link
from fp8sync.link.commit import CLOSED
from fp8sync.link.follower import FollowerLink
from fp8sync.recipe import Recipe
from fp8sync.trainers import Opening
from scripts.bench import refit_world
from tests.layouts.cases import QWEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

dist: Any = torch.distributed
CPU = torch.device("cpu")
SOURCE, WANTED = manifest(TrainerLayout(tp=2), QWEN), manifest(EngineLayout(tp=2), QWEN)
WAIT_S = 60.0


class Worker(refit_world.Worker):
    """Does as others do until it is asked to stop: then it is silent, as one that vLLM has given up."""

    stops_at = ""
    tells: Fp8SyncError | None = None

    def join(self, store: Any, key: str) -> None:
        if self.stops_at != "join":
            super().join(store, key)
            return
        self._channel = self._arrive(store, key)
        if self.tells is not None:
            self._channel.send({"type": "error", "error": self.tells.to_wire()})

    def take(self) -> None:
        """One version, to the vote and through the commit if there is one."""
        channel = self._channel
        self._vote(self._receiver.receive, int(channel.receive("version")["version"]))
        channel.receive("prepare")
        if self.stops_at == "prepare":
            return
        channel.send({"type": "vote", "error": None})
        if channel.receive("decision")["commit"] and self.stops_at != "decision":
            self._committed()


class Engine(Handle):
    """Two workers. An error in `fails` is raised by the call of that name, once the second worker is through."""

    def __init__(self) -> None:
        super().__init__(self, 2)
        self._store, self._pool = dist.HashStore(), ThreadPoolExecutor(2)
        self.of_two = [Worker(refit_world.own(WANTED, rank), rank, CPU) for rank in (0, 1)]
        self.fails: dict[str, BaseException] = {}

    def _wait(self, name: str) -> None:
        if name in self.fails:
            self._steps[1].result()
            raise self.fails.pop(name)
        for each in self._steps:
            each.result()

    def initialize(self, info: dict[str, Any]) -> None:
        if "ask" in self.fails:
            raise self.fails.pop("ask")
        key = str(info["token"])
        self._store.set(key, f"{info['port']} {key}")
        self._steps = [self._pool.submit(worker.join, self._store, key) for worker in self.of_two]
        self._wait("initialize")

    def start(self) -> None:
        self._steps = [self._pool.submit(worker.take) for worker in self.of_two]

    def update(self, version: int, *, renew: bool = False) -> None:
        """It arrives by itself."""

    def finish(self) -> None:
        self._wait("finish")

    def check_requests(self, in_flight: Any) -> None:
        if "requests" in self.fails:
            raise self.fails.pop("requests")

    def pause(self, in_flight: Any, *, once: bool) -> float:
        if "pause" in self.fails:
            raise self.fails.pop("pause")
        return time.perf_counter()

    def resume(self) -> None:
        if "resume" in self.fails:
            raise self.fails.pop("resume")

    def reset_caches(self, in_flight: Any, *, stale: bool) -> None:
        if "caches" in self.fails:
            raise self.fails.pop("caches")

    def last_label(self) -> int:
        return 0

    def label(self, version: str) -> bool:
        if "label" in self.fails:
            raise self.fails.pop("label")
        return False


class Pair:
    """Trainer ranks 0 and 1, an engine, and what ranks 0 and 1 raised."""

    def __init__(self) -> None:
        self.engine, self.said = Engine(), queue.Queue[Any]()
        held = [refit_world.allocated(SOURCE, rank, CPU) for rank in (0, 1)]
        self._sources = [
            refit_world.PaperSource(refit_world.own(SOURCE, rank), held[rank]) for rank in (0, 1)
        ]
        self._pool = ThreadPoolExecutor(1)
        self.links: list[Any] = [None, None]

    def both(
        self, leads: Callable[[], Any], follows: Callable[[], Any]
    ) -> list[BaseException | None]:
        following = self._pool.submit(follows)
        raised: BaseException | None = None
        try:
            self.links[0] = leads() or self.links[0]
        except BaseException as error:  # noqa: BLE001
            raised = error
        other = following.exception(WAIT_S)
        if other is None:
            self.links[1] = following.result() or self.links[1]
        return [raised, other]

    def connect(self) -> list[BaseException | None]:
        about: Any = {"timeout_s": WAIT_S, "transport": "gloo", "bucket_bytes": 1 << 15}
        return self.both(
            lambda: connect(self._sources[0], self.engine, "blockwise-pow2", **about),
            lambda: FollowerLink(self._sources[1], Recipe("blockwise-pow2"), WAIT_S),
        )

    def refit(self) -> list[BaseException | None]:
        leads, follows = self.links
        return self.both(lambda: leads.refit() and None, lambda: follows.refit() and None)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """What rank 0 tells goes through a queue, in the place of a process group's store."""
    pair = Pair()
    monkeypatch.setattr(link, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr("fp8sync.link.follower.rank_and_size", lambda: (1, 2))
    monkeypatch.setattr("fp8sync.link.follower.hear", lambda _: pair.said.get(timeout=WAIT_S))

    def say(opening: Opening, message: Any) -> None:
        opening._said = True
        pair.said.put(message)

    monkeypatch.setattr(Opening, "say", say)
    monkeypatch.setattr(refit_world, "TIMEOUT_S", WAIT_S)
    monkeypatch.setattr(
        "fp8sync.link.together._MOMENT_S", 1.5
    )  # both ranks are threads of one process
    began = time.monotonic()
    yield pair
    assert time.monotonic() - began < 0.8 * WAIT_S  # nobody has waited in vain
    for each in pair.links:
        if each is not None:
            each.close()


ANSWER = "the server answered 500"
ERRORS = [InstallFailed(ANSWER), RuntimeError(ANSWER)]


def heard(told: BaseException | None, error: Exception) -> None:
    """A follower hears the error, or what it says of itself."""
    ours = error if isinstance(error, Fp8SyncError) else Fp8SyncError(repr(error))
    assert (type(told), str(told)) == (type(ours), str(ours))


def the_next_arrives(pair: Pair, version: int = 1) -> None:
    pair.engine.of_two[1].stops_at = ""
    assert pair.refit() == [None, None]
    assert pair.links[0].version == pair.links[1].version == version


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("call", ["ask", "initialize"])
def test_while_a_link_is_made(pair: Pair, call: str, error: Exception) -> None:
    """Before any worker has come; or when both have, and one never describes itself."""
    pair.engine.of_two[1].stops_at = "join"
    pair.engine.fails[call] = error
    first, second = pair.connect()
    assert first is error
    heard(second, error)
    pair.engine.of_two[1].stops_at = ""
    assert pair.connect() == [None, None]
    the_next_arrives(pair)


def test_between_two_who_join(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rendezvous is closed when the second is about to be waited for."""
    accept, peers = Listener.accept, list[str]()

    def late(listener: Listener, peer: str) -> Any:
        peers.append(peer)
        while len(peers) > 1 and listener._sock.fileno() != -1:
            time.sleep(0.01)
        return accept(listener, peer)

    monkeypatch.setattr(Listener, "accept", late)
    pair.engine.fails["ask"] = ERRORS[1]
    first, second = pair.connect()
    assert (first, len(peers)) == (ERRORS[1], 2)
    heard(second, ERRORS[1])


def test_what_a_worker_has_said_before(pair: Pair) -> None:
    """It says more than the call that failed for it."""
    told = TensorMismatch("engine rank 1", ["lm_head.weight: expected it, found nothing"])
    pair.engine.of_two[1].stops_at, pair.engine.of_two[1].tells = "join", told
    failed = pair.engine.fails["initialize"] = RuntimeError(ANSWER)
    first, second = pair.connect()
    assert (type(first), str(first)) == (TensorMismatch, str(told))
    assert first.__cause__ is failed
    heard(second, told)


LATE = TransferTimeout("the engine did not answer finish_weight_update within 60 s")


@pytest.mark.parametrize("error", [*ERRORS, LATE, EngineLost("the engine died")])
def test_before_the_decision(pair: Pair, error: Exception) -> None:
    assert pair.connect() == [None, None]
    pair.engine.of_two[1].stops_at = "prepare"
    pair.engine.fails["finish"] = error
    first, second = pair.refit()
    assert first is error
    heard(second, error)
    the_next_arrives(pair)


def test_what_was_lost_before(pair: Pair) -> None:
    """A worker, while bytes were sent: that the call failed, too, is its consequence."""
    assert pair.connect() == [None, None]
    first, second = pair.engine.of_two
    first.stops_at = second.stops_at = "prepare"
    receive = first._receiver.receive
    first._receiver.receive = lambda *args: (receive(*args), first._channel.close())
    failed = pair.engine.fails["finish"] = RuntimeError(ANSWER)
    leader, follower = pair.refit()
    assert isinstance(leader, EngineLost)
    assert leader.summary == "engine rank 0 closed the connection; expected 'vote'"
    assert leader.__cause__ is failed
    heard(follower, leader)
    first.stops_at = ""
    the_next_arrives(pair)


def test_faults_are_heard_where_replicas_cannot_be_paused_for_them(pair: Pair) -> None:
    assert pair.connect() == [None, None]
    pair.engine.replicas = 2
    worker, told = pair.engine.of_two[1], CorruptBucket("of another refit")
    receive = worker._receiver.receive

    def receive_and_fail(*args: Any) -> None:
        receive(*args)
        worker._receiver.receive = receive
        raise told

    worker._receiver.receive = receive_and_fail
    pair.engine.fails["pause"] = RuntimeError(ANSWER)
    first, second = pair.refit()
    assert isinstance(first, CorruptBucket)
    heard(second, first)
    assert not pair.engine.fails
    the_next_arrives(pair)


BUSY = Fp8SyncError("3 requests are in flight")


@pytest.mark.parametrize(("again", "error"), [(False, BUSY), (True, BUSY), (False, LATE)])
def test_requests_that_cannot_be_waited_for(pair: Pair, again: bool, error: Fp8SyncError) -> None:
    """They are looked at once the link knows how another one has left the engine."""
    assert pair.connect() == [None, None]
    if again:
        pair.links[0]._disconnect()
    pair.engine.fails["requests"] = error
    first, second = pair.refit()
    assert first is error
    heard(second, error)
    the_next_arrives(pair)


@pytest.mark.parametrize("error", [*ERRORS, LATE])
def test_after_the_decision(pair: Pair, error: Exception) -> None:
    """The engine may hold parts of two versions, which is what has to be known."""
    assert pair.connect() == [None, None]
    pair.engine.of_two[1].stops_at = "decision"
    pair.engine.fails["finish"] = error
    first, second = pair.refit()
    assert isinstance(first, EngineUnusable)
    assert first.summary.startswith("installing failed after the decision")
    assert first.violations == (str(error) if isinstance(error, Fp8SyncError) else repr(error),)
    heard(second, first)
    the_next_arrives(pair)


@pytest.mark.parametrize(("mixed", "stops_at"), [(False, "decision"), (True, "prepare")])
def test_a_link_that_is_closed_over_parts_of_two_versions(
    pair: Pair, mixed: bool, stops_at: str
) -> None:
    """After the decision, or whenever it held them before: not as if old weights served."""
    assert pair.connect() == [None, None]
    worker, (link, _) = pair.engine.of_two[1], pair.links
    if mixed:
        worker.stops_at, pair.engine.fails["finish"] = "decision", LATE
        assert isinstance(pair.refit()[0], EngineUnusable)
    worker.stops_at, steps = stops_at, pair.engine._wait

    def closed(name: str) -> None:
        if name == "finish":
            pair.engine._steps[1].result()
            link.close()
            raise LATE
        steps(name)

    pair.engine._wait = closed
    first, second = pair.refit()
    assert (type(first), first.summary) == (EngineUnusable, CLOSED)
    assert isinstance(second, EngineLost)
    assert link._mixed
    with pytest.raises(Fp8SyncError, match="this link was closed"):
        link.refit()


def test_an_engine_that_takes_its_time_to_say_its_label(pair: Pair) -> None:
    """The other ranks hear of a version after that, and wait for as long as it may take."""
    assert pair.connect() == [None, None]
    (follower,) = pair.links[1]._followers.values()
    follower._channel.timeout_s = 1.0
    pair.engine.last_label = lambda: time.sleep(1.5) or 0
    the_next_arrives(pair)


@pytest.mark.parametrize(
    ("call", "kind", "error"),
    [
        ("caches", EngineUnusable, ERRORS[1]),
        ("caches", EngineUnusable, LATE),
        ("caches", EngineLost, EngineLost("the engine died")),
        ("label", Fp8SyncError, LATE),
        ("resume", Fp8SyncError, ERRORS[1]),
        ("resume", Fp8SyncError, LATE),
    ],
)
def test_after_the_commit(
    pair: Pair, call: str, kind: type[Fp8SyncError], error: Exception
) -> None:
    """Every rank hears that the new weights are installed, and what was not done after that."""
    assert pair.connect() == [None, None]
    pair.engine.fails[call] = error
    first, second = pair.refit()
    assert type(first) is kind
    assert first.summary.startswith("the new weights are installed")
    assert first.violations == (str(error),)
    assert pair.links[0].version == 1
    heard(second, first)
    the_next_arrives(pair, 2)


def test_an_interrupt_of_the_user_is_no_error_of_ours(pair: Pair) -> None:
    pressed = pair.engine.fails["ask"] = KeyboardInterrupt()
    first, second = pair.connect()
    assert first is pressed
    assert str(second) == "KeyboardInterrupt()"
