"""Trainer rank 0's channels to many peers, over real sockets."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from fp8sync.control import Channel
from fp8sync.errors import EngineLost
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
