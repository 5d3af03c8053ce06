"""Trainer rank 0's channels to many peers, over real sockets."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from fp8sync.control import Channel, Listener
from fp8sync.errors import EngineLost, Fp8SyncError, TransferTimeout
from fp8sync.link.peers import Peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 60.0
LONG = {"type": "source", "manifest": random.Random(0).randbytes(12 << 20).hex()}
"""More than sockets buffer, also when it is compressed."""


@pytest.fixture
def joined() -> Iterator[tuple[Peers, list[Channel]]]:
    """Rank 0's side, and three trainer ranks."""
    peers, others = Peers(4, [1], WAIT_S), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        for rank in (1, 2, 3):
            theirs = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
            others.append(Channel(theirs, "trainer rank 0", WAIT_S))
            peers.channels["trainer", rank] = Channel(accepted, f"trainer rank {rank}", WAIT_S)
    yield peers, others
    peers.close()
    for channel in others:
        channel.close()


@pytest.mark.parametrize("way", [Peers.tell, Peers.spread])
def test_a_message_for_many_is_encoded_once(
    way: Any, joined: tuple[Peers, list[Channel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, others = joined
    dumps, encoded = json.dumps, []

    def counted(message: Any, **options: Any) -> str:
        encoded.append(message)
        return dumps(message, **options)

    monkeypatch.setattr(json, "dumps", counted)
    way(peers, "trainer", {"type": "nodes", "nodes": []})
    assert len(encoded) == 1
    assert [other.receive("nodes")["nodes"] for other in others] == [[], [], []]


def test_nobody_waits_for_a_peer_that_reads_late(joined: tuple[Peers, list[Channel]]) -> None:
    """The last one reads first; all get the same."""
    peers, others = joined
    with ThreadPoolExecutor(1) as pool:
        telling = pool.submit(peers.tell, "trainer", LONG)
        for other in reversed(others):
            assert other.receive("source") == LONG
        telling.result(WAIT_S)


def test_a_peer_that_is_gone_is_named(joined: tuple[Peers, list[Channel]]) -> None:
    peers, others = joined
    others[1].close()
    with ThreadPoolExecutor(1) as pool:
        telling = pool.submit(peers.tell, "trainer", LONG)
        for other in (others[0], others[2]):
            assert other.receive("source") == LONG
        with pytest.raises(EngineLost, match="trainer rank 2 is gone"):
            telling.result(WAIT_S)


SILENT_S = 3.0


def test_silent_peers_cost_one_timeout_and_what_others_said_is_heard(
    joined: tuple[Peers, list[Channel]],
) -> None:
    """The last has spoken, in time; its message is longer than one read."""
    peers, others = joined
    with ThreadPoolExecutor(1) as pool:
        telling = pool.submit(others[2].send, {"type": "sent", "parts": "x" * (1 << 19)})
        began = time.monotonic()
        said, lost = peers.hear("trainer", "sent", SILENT_S)
        waited_s = time.monotonic() - began
        telling.result(WAIT_S)
    assert SILENT_S < waited_s < 1.5 * SILENT_S
    assert [each["peer"] for each in said] == ["trainer rank 3"]
    assert [str(error) for error in lost] == [
        f"trainer rank {rank} sent no 'sent' within 3 s" for rank in (1, 2)
    ]


def test_a_peer_at_work_has_its_own_time_after_a_silent_one(
    joined: tuple[Peers, list[Channel]],
) -> None:
    """What it said of its progress lies there when its turn comes, and its time begins anew then."""
    peers, others = joined

    def work() -> None:
        others[1].progress(1)
        ends = time.monotonic() + WAIT_S
        while ("trainer", 1) not in peers.lost and time.monotonic() < ends:
            time.sleep(0.01)
        time.sleep(0.5 * SILENT_S)
        others[1].send({"type": "sent"})

    others[2].send({"type": "sent"})
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        said, lost = peers.hear("trainer", "sent", SILENT_S)
        working.result(WAIT_S)
    assert [each["peer"] for each in said] == ["trainer rank 2", "trainer rank 3"]
    assert [type(error) for error in lost] == [TransferTimeout]


def test_peers_that_fall_silent_at_work_are_waited_for_together(
    joined: tuple[Peers, list[Channel]],
) -> None:
    """Each has said once that it gets on."""
    peers, others = joined
    for other in others:
        other.progress(1)
    began = time.monotonic()
    said, lost = peers.hear("trainer", "sent", SILENT_S)
    assert SILENT_S < time.monotonic() - began < 2.5 * SILENT_S
    assert said == []
    assert [str(error) for error in lost] == [
        f"trainer rank {rank} sent no 'sent' within 3 s" for rank in (1, 2, 3)
    ]


TOKEN = "5ca1ab1e" * 4


@pytest.fixture
def door() -> Iterator[Callable[..., Any]]:
    """Where peers of two trainer ranks and two engines of two workers join; `door(limit_s, *members)`."""
    ends: list[Any] = []

    def joining(limit_s: float, *members: tuple[str, int]) -> tuple[Peers, Listener, list[Channel]]:
        peers, listener = Peers(3, [2, 2], limit_s), Listener(TOKEN, timeout_s=limit_s)
        theirs = [Channel.connect("127.0.0.1", listener.port, TOKEN, WAIT_S) for _ in members]
        for channel, (role, rank) in zip(theirs, members, strict=True):
            said = {"role": role, "rank": rank, "updating": False, "mixed": False, "stopped": ""}
            said |= {"renews": False}
            channel.send({"type": "join", **said})
        ends.extend((peers, listener, *theirs))
        return peers, listener, theirs

    yield joining
    for end in ends:
        end.close()


def test_who_does_not_come_is_named(door: Callable[..., Any]) -> None:
    peers, listener, _ = door(0.5, ("engine", 3), ("trainer", 1), ("engine", 0))
    with pytest.raises(TransferTimeout, match=r"peer 4 of 6 did not join within 0\.5 s") as raised:
        peers.accept(listener)
    assert raised.value.violations == (
        "engine rank 1 of engine 0 has not joined",
        "engine rank 2 of engine 1 has not joined",
        "trainer rank 2 has not joined",
    )


def test_who_had_not_come_when_the_door_closed_is_named(door: Callable[..., Any]) -> None:
    peers, listener, _ = door(WAIT_S, ("engine", 0), ("engine", 1), ("engine", 2), ("engine", 3))
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(peers.accept, listener)
        while len(peers.channels) < 4:
            time.sleep(0.01)
        listener.close()
        with pytest.raises(EngineLost, match="peer 5 of 6 did not join") as raised:
            accepting.result(WAIT_S)
    names = tuple(f"trainer rank {rank} has not joined" for rank in (1, 2))
    assert raised.value.violations == names


@pytest.mark.parametrize("member", [("engine", 0), ("engine", 4), ("trainer", 0), ("cook", 1)])
def test_who_is_refused_hears_why(door: Callable[..., Any], member: tuple[str, int]) -> None:
    peers, listener, theirs = door(WAIT_S, ("engine", 0), member)
    with pytest.raises(Fp8SyncError) as raised:
        peers.accept(listener)
    role, rank = member
    assert str(raised.value).startswith(f"{role} rank {rank}")
    assert str(raised.value).endswith("joined twice, or is not expected here")
    with pytest.raises(Fp8SyncError) as told:
        theirs[1].receive("source")
    assert str(told.value) == str(raised.value)
    assert theirs[1].hung_up()
    assert not theirs[0].hung_up()


def test_who_does_not_say_join_is_hung_up_on(door: Callable[..., Any]) -> None:
    peers, listener, _ = door(0.5)
    with closing(Channel.connect("127.0.0.1", listener.port, TOKEN, WAIT_S)) as mute:
        with pytest.raises(TransferTimeout, match="peer 1 of 6 sent no 'join'") as raised:
            peers.accept(listener)
        assert len(raised.value.violations) == 6
        with pytest.raises(TransferTimeout, match="peer 1 of 6 sent no 'join'"):
            mute.receive("source")
        assert mute.hung_up()
