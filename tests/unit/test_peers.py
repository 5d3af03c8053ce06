"""Trainer rank 0's channels to many peers, over real sockets."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from fp8sync.control import Channel
from fp8sync.errors import EngineLost, TransferTimeout
from fp8sync.link.peers import Peers

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 5.0
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


SILENT_S = 1.0


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
        f"trainer rank {rank} sent no 'sent' within 1 s" for rank in (1, 2)
    ]


def test_a_peer_at_work_has_its_own_time_after_a_silent_one(
    joined: tuple[Peers, list[Channel]],
) -> None:
    """What it said of its progress lies there when its turn comes, and its time begins anew then."""
    peers, others = joined

    def work() -> None:
        others[1].progress(1)
        time.sleep(1.6 * SILENT_S)
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
        f"trainer rank {rank} sent no 'sent' within 1 s" for rank in (1, 2, 3)
    ]
