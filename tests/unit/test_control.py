"""The control channel over real sockets, with peers that are wrong, hostile, slow or gone."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from fp8sync.control import Channel, Listener
from fp8sync.errors import CorruptBucket, EngineLost, Fp8SyncError, TransferTimeout
from tests import ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOKEN = "5ca1ab1e" * 4
WAIT_S = 5.0
LONG = random.Random(0).randbytes(12 << 20).hex()
"""More than sockets buffer, also when it is compressed."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    with_token = Listener(TOKEN, timeout_s=WAIT_S)
    yield with_token
    with_token.close()


def framed(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def packed(data: bytes) -> bytes:
    return struct.pack("<I", 1 << 31 | len(data)) + data


def test_messages_arrive_whole_and_in_order(listener: Listener) -> None:
    long = {"type": "manifest", "manifest": ["×" * 3_000_000]}
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(Channel.connect, "127.0.0.1", listener.port, TOKEN, WAIT_S)
        trainer = listener.accept("engine worker 0 of 1")
        worker = joined.result()
        sending = pool.submit(lambda: [worker.send(m) for m in (long, {"type": "plan"})])
        assert trainer.receive("manifest") == long
        assert trainer.receive("plan") == {"type": "plan"}
        sending.result()
        trainer.send({"type": "agreed", "digest": None})
        assert worker.receive("agreed") == {"type": "agreed", "digest": None}
    trainer.close()
    worker.close()


def test_who_has_hung_up_is_known_without_waiting(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    assert not channel.hung_up()
    peer.sendall(framed(b'{"type": "vote"}'))
    assert not channel.hung_up()
    assert channel.receive("vote") == {"type": "vote"}  # it was looked at, and left
    peer.close()
    ends = time.monotonic() + WAIT_S
    while not channel.hung_up():
        assert time.monotonic() < ends
    channel.close()
    assert channel.hung_up()


def test_a_frame_is_a_length_and_json(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    channel.send({"type": "version", "version": 3})
    size = struct.unpack("<I", peer.recv(4, socket.MSG_WAITALL))[0]
    assert json.loads(peer.recv(size, socket.MSG_WAITALL)) == {"type": "version", "version": 3}


def test_only_loopback_is_bound_unless_told_otherwise(listener: Listener) -> None:
    assert listener._sock.getsockname() == ("127.0.0.1", listener.port)
    assert listener.host == "127.0.0.1"


# --- who gets in ----------------------------------------------------------------------------------


def test_bytes_arrive_with_their_message(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    attached = [b"\x00\xff" * 500_000, b"", b"\x7b}"]
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(
            lambda: [
                channel.send(*each) for each in (({"type": "written"}, attached), ({"type": "a"},))
            ]
        )
        other = Channel(peer, "trainer", timeout_s=WAIT_S)
        assert other.receive("written")["attached"] == attached
        assert other.receive("a") == {"type": "a"}
        sending.result()


INTRUDERS: dict[str, bytes] = {
    "wrong token": framed(b'{"type":"hello","token":"0000"}'),
    "no token": framed(b'{"type":"hello"}'),
    "empty token": framed(b'{"type":"hello","token":""}'),
    "token of another type": framed(b'{"type":"hello","token":["%s"]}' % TOKEN.encode()),
    "prefix of the token": framed(b'{"type":"hello","token":"%s"}' % TOKEN[:-1].encode()),
    "half a character": framed(b'{"type":"hello","token":"\\ud800"}'),
    "another message first": framed(b'{"type":"worker","rank":0}'),
    "an error first": framed(b'{"type":"error","error":{"kind":"EngineLost","summary":"x"}}'),
    "an error without content": framed(b'{"type":"error"}'),
    "an error that is a number": framed(b'{"type":"error","error":5}'),
    "errors that are a number": framed(b'{"type":"error","error":{"violations":5}}'),
    "not an object": framed(b"[1,2]"),
    "not JSON": framed(b"\x80\x04\x95garbage"),
    "not UTF-8": framed(b'{"type":"\xff\xfe"}'),
    "deep nesting": framed(b"[" * 100_000),
    "a very long number": framed(b'{"type":' + b"9" * 5000 + b"}"),
    "oversized length": b"\xff\xff\xff\xff",
    "bytes attached": framed(b'{"type":"hello","attached":[1025]}'),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "nothing": b"",
    "half a length": b"\x10\x00",
    "half a message": framed(b'{"type":"hello"}')[:-3],
}


@pytest.mark.parametrize("name", INTRUDERS)
def test_an_intruder_is_turned_away_and_the_worker_still_gets_in(
    name: str, listener: Listener
) -> None:
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept, "engine worker 0 of 1")
        with socket.create_connection(("127.0.0.1", listener.port)) as intruder:
            with suppress(OSError):  # it may be hung up on before it has said everything
                intruder.sendall(INTRUDERS[name])
                intruder.shutdown(socket.SHUT_WR)
            intruder.settimeout(WAIT_S)
            assert _closed(intruder)
        worker = Channel.connect("127.0.0.1", listener.port, TOKEN, WAIT_S)
        trainer = accepted.result(WAIT_S)
        worker.send({"type": "worker", "rank": 0})
        assert trainer.receive("worker") == {"type": "worker", "rank": 0}
    trainer.close()
    worker.close()


def _closed(sock: socket.socket) -> bool:
    """Whether the other side hung up without a word."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_nobody_comes() -> None:
    listener = Listener(TOKEN, timeout_s=0.2)
    began = time.monotonic()
    with pytest.raises(TransferTimeout, match=r"engine worker 1 of 2 did not join within 0\.2 s"):
        listener.accept("engine worker 1 of 2")
    assert 0.15 < time.monotonic() - began < 3
    listener.close()


def test_closing_the_listener_wakes_who_waits() -> None:
    listener = Listener(TOKEN, timeout_s=60)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(listener.accept, "engine worker 0 of 1")
        time.sleep(0.1)
        listener.close()
        with pytest.raises(EngineLost, match="engine worker 0 of 1 did not join"):
            waiting.result(WAIT_S)


def test_a_closed_listener_waits_for_nobody() -> None:
    listener = Listener(TOKEN, timeout_s=60)
    listener.close()
    with pytest.raises(EngineLost, match="engine worker 0 of 1 did not join"):
        listener.accept("engine worker 0 of 1")


def test_nobody_listens() -> None:
    port = ports.free()
    with pytest.raises(EngineLost, match=f"no trainer link answers at 127.0.0.1:{port}"):
        Channel.connect("127.0.0.1", port, TOKEN, WAIT_S)


# --- what a peer that got in may send --------------------------------------------------------------

BAD_MESSAGES: dict[str, tuple[bytes, str]] = {
    "oversized length": (b"\x01\x00\x00\x40", "announced a message of 1073741825 bytes"),
    "not an object": (framed(b'["vote"]'), "sent list, expected an object"),
    "null": (framed(b"null"), "sent NoneType, expected an object"),
    "out of turn": (framed(b'{"type":"ready"}'), "sent 'ready', expected 'vote'"),
    "without a type": (framed(b"{}"), "sent None, expected 'vote'"),
    "garbage": (framed(b"\x80\x04K\x01."), ""),
    "an empty message": (framed(b""), ""),
    "not UTF-8": (framed(b'{"type":"\xff"}'), ""),
    "deep nesting": (framed(b"[" * 100_000), ""),
    "more bytes than allowed": (
        framed(b'{"type":"vote","attached":[1,1073741824]}'),
        "attached [1, 1073741824] bytes to 'vote'",
    ),
    "fewer bytes than none": (framed(b'{"type":"vote","attached":[2,-1]}'), "attached [2, -1]"),
    "bytes that are no list": (framed(b'{"type":"vote","attached":7}'), "attached 7"),
    "bytes that are no number": (framed(b'{"type":"vote","attached":[true]}'), "attached [True]"),
    "not compressed": (packed(b'{"type":"vote"}'), "sent what cannot be decompressed"),
    "cut off while compressed": (packed(zlib.compress(b'{"type":"vote"}')[:-1]), "is cut off"),
    "more after what is compressed": (
        packed(zlib.compress(b'{"type":"vote"}') + b"x"),
        "goes on after its end",
    ),
    "an error without content": (framed(b'{"type":"error"}'), ""),
    "an error that is a list": (framed(b'{"type":"error","error":[1]}'), ""),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_bad_message_is_an_error_that_names_the_peer(
    name: str, pair: tuple[Channel, socket.socket]
) -> None:
    channel, peer = pair
    data, says = BAD_MESSAGES[name]
    peer.sendall(data)
    with pytest.raises(Fp8SyncError) as refusal:
        channel.receive("vote")
    assert "engine rank 7" in str(refusal.value)
    assert says in str(refusal.value)


def test_a_peers_error_is_raised_as_itself(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    told = CorruptBucket("a bucket is not the one", ["engine rank 7, bucket 1: index"])
    peer.sendall(framed(json.dumps({"type": "error", "error": told.to_wire()}).encode()))
    with pytest.raises(CorruptBucket) as raised:
        channel.receive("vote")
    assert str(raised.value) == str(told)


def test_silence_is_a_timeout_that_names_peer_and_message(
    pair: tuple[Channel, socket.socket],
) -> None:
    channel, _ = pair
    with pytest.raises(TransferTimeout, match=r"engine rank 7 sent no 'vote' within 0\.2 s"):
        channel.receive("vote", timeout_s=0.2)
    channel.timeout_s = 0.1
    with pytest.raises(TransferTimeout, match=r"engine rank 7 sent no 'vote' within 0\.1 s"):
        channel.receive("vote")


def test_a_message_that_never_ends_is_a_timeout(pair: tuple[Channel, socket.socket]) -> None:
    """Each byte in time, the message not."""
    channel, peer = pair
    done = threading.Event()

    def drip() -> None:
        peer.sendall(struct.pack("<I", 10_000))
        while not done.wait(0.1):
            peer.sendall(b" ")

    with ThreadPoolExecutor(1) as pool:
        dripping = pool.submit(drip)
        began = time.monotonic()
        try:
            with pytest.raises(TransferTimeout, match="engine rank 7"):
                channel.receive("vote", timeout_s=0.5)
            assert time.monotonic() - began < 3
        finally:
            done.set()
            dripping.result()


def test_a_peer_that_reads_nothing_is_a_timeout(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    channel.timeout_s = 0.2
    with pytest.raises(TransferTimeout, match="engine rank 7 reads nothing within"):
        channel.send({"type": "manifest", "manifest": LONG})


@pytest.mark.parametrize("sent", [b"", b"\x10", framed(b'{"type":"vote"}')[:-1]])
def test_a_peer_that_hangs_up_is_lost(sent: bytes, pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    peer.sendall(sent)
    peer.close()
    with pytest.raises(EngineLost, match="engine rank 7 closed the connection; expected 'vote'"):
        channel.receive("vote")


def test_sending_to_a_peer_that_is_gone(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    peer.close()
    with pytest.raises(EngineLost, match="engine rank 7 is gone"):
        channel.send({"type": "manifest", "manifest": LONG})


def test_closing_a_channel_wakes_who_waits(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    with ThreadPoolExecutor(1) as pool:
        waiting: Callable[[], object] = pool.submit(channel.receive, "vote").result
        time.sleep(0.1)
        channel.close()
        with pytest.raises(EngineLost, match="engine rank 7"):
            waiting()


def test_a_deaf_channel_hears_what_has_arrived_and_still_speaks(
    pair: tuple[Channel, socket.socket],
) -> None:
    channel, peer = pair
    peer.sendall(framed(b'{"type":"vote"}'))
    time.sleep(0.1)
    channel.deafen()
    assert channel.receive("vote") == {"type": "vote"}
    with pytest.raises(EngineLost, match="engine rank 7"):
        channel.receive("vote")
    channel.send({"type": "decision"})
    assert Channel(peer, "trainer", WAIT_S).receive("decision") == {"type": "decision"}


def test_deafening_a_channel_wakes_who_waits(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    with ThreadPoolExecutor(1) as pool:
        waiting: Callable[[], object] = pool.submit(channel.receive, "vote").result
        time.sleep(0.1)
        began = time.monotonic()
        channel.deafen()
        with pytest.raises(EngineLost, match="engine rank 7"):
            waiting()
        assert time.monotonic() - began < WAIT_S / 2


def test_values_that_are_not_json_are_never_sent(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    with pytest.raises(ValueError, match="not JSON compliant"):
        channel.send({"type": "sent", "error_sq": float("nan")})


class Bomb:
    """What unpickling would run: it leaves a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (self.path,)


def test_a_pickle_is_only_bytes(pair: tuple[Channel, socket.socket], tmp_path) -> None:
    import pickle

    channel, peer = pair
    bomb = pickle.dumps(Bomb(str(tmp_path / "exploded")))
    peer.sendall(framed(bomb))
    with pytest.raises(Fp8SyncError):
        channel.receive("vote")
    assert list(tmp_path.iterdir()) == []
    pickle.loads(bomb)
    assert [path.name for path in tmp_path.iterdir()] == ["exploded"]


# --- a peer that is at work -----------------------------------------------------------------------


def test_a_peer_that_gets_on_is_waited_for(listener: Listener) -> None:
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(Channel.connect, "127.0.0.1", listener.port, TOKEN, WAIT_S)
        trainer, worker = listener.accept("trainer rank 1"), joined.result()
        began = time.monotonic()

        def work() -> None:
            for left in range(9, -1, -1):
                time.sleep(0.25)
                worker.progress(left)
            worker.send({"type": "sent"})

        pool.submit(work)
        assert trainer.receive("sent", 2.0) == {"type": "sent"}
        assert time.monotonic() - began > 2.0
        worker.progress(5)
        with pytest.raises(TransferTimeout, match=r"sent no 'sent' within 0\.3 s"):
            trainer.receive("sent", 0.3)
    trainer.close()
    worker.close()


@pytest.mark.parametrize("left", [7, 8, -1, "6", None, 6.5])
def test_a_peer_that_only_says_so_is_not_waited_for(
    pair: tuple[Channel, socket.socket], left: object
) -> None:
    channel, peer = pair
    for value in (7, left):
        peer.sendall(framed(json.dumps({"type": "progress", "left": value}).encode()))
    with pytest.raises(Fp8SyncError, match=r"engine rank 7 said progress with .* left after 7"):
        channel.receive("sent")
