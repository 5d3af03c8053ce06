"""The control channel: length-prefixed JSON over TCP between the trainer's link and engine workers.

Manifests, votes and errors travel here, digests as bytes attached to them; weights never do. A worker proves itself with the link's
token in its first message. Nothing is ever unpickled. The listener binds loopback unless told otherwise.
"""

from __future__ import annotations

import hmac
import json
import math
import select
import socket
import struct
import time
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fp8sync.errors import EngineLost, Fp8SyncError, TransferTimeout, from_wire
from fp8sync.waiting import waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Channel", "Listener", "Message", "framed"]

_LENGTH = struct.Struct("<I")
_PACKED = 1 << 31
"""In a length: the JSON is compressed, and this many bytes of that follow."""
_PACKED_FROM = 1 << 20
"""Large manifests are a twentieth of their size then; smaller messages are not worth the time."""
_MAX_BYTES = 1 << 30
_HELLO_BYTES = 1 << 10
"""Largest first message: whoever sends it has not shown the token yet."""
_HELLO_S = 5.0
_DRAIN_S = 0.01
"""How long the next message may take that is read only for what is to be heeded."""

Message = dict[str, Any]


def framed(message: Message, attached: Sequence[bytes] = ()) -> bytes:
    """Return what travels: length, JSON, and the bytes attached, of which the JSON says how many.

    Long JSON is compressed.
    """
    if attached:
        message = {**message, "attached": [len(each) for each in attached]}
    data = json.dumps(message, allow_nan=False).encode()
    if len(data) < _PACKED_FROM:
        return b"".join((_LENGTH.pack(len(data)), data, *attached))
    packed = zlib.compress(data, 1)
    return b"".join((_LENGTH.pack(_PACKED | len(packed)), packed, *attached))


class Channel:
    """One connected peer. `peer` names it in errors. Not shared between threads."""

    def __init__(self, sock: socket.socket, peer: str, timeout_s: float) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self.peer = peer
        self.timeout_s = timeout_s
        self.heed: Callable[[Message], None] = lambda _: None
        """Called with each `stopped`, which may come before any other message."""

    @classmethod
    def connect(cls, host: str, port: int, token: str, timeout_s: float) -> Channel:
        """Join the link listening at `host:port` and present its token."""
        try:
            sock = socket.create_connection((host, port), timeout=timeout_s)
        except OSError as error:
            raise EngineLost(f"no trainer link answers at {host}:{port}: {error}") from error
        channel = cls(sock, f"trainer at {host}:{port}", timeout_s)
        channel.send({"type": "hello", "token": token})
        return channel

    def send(self, message: Message, attached: Sequence[bytes] = ()) -> None:
        """Send one message; the peer finds bytes under `attached`.

        Raises:
            EngineLost: the peer is gone.
            TransferTimeout: the peer does not read.
        """
        self.send_framed(framed(message, attached))

    def send_framed(self, data: bytes) -> None:
        """Send what `framed` returned, so that a message for many is encoded once.

        Raises:
            EngineLost, TransferTimeout: as `send`.
        """
        try:
            self._sock.settimeout(self.timeout_s)
            with waiting():
                self._sock.sendall(data)
        except TimeoutError as error:
            raise self._late("reads nothing", self.timeout_s) from error
        except OSError as error:
            raise EngineLost(f"{self.peer} is gone: {error}") from error

    def try_send(self, message: Message, attached: Sequence[bytes] = ()) -> None:
        """Send one message to a peer that may be gone."""
        with suppress(EngineLost, TransferTimeout):
            self.send(message, attached)

    def receive(
        self,
        kind: str,
        timeout_s: float | None = None,
        max_bytes: int = _MAX_BYTES,
        ends: float | None = None,
        late: str | None = None,
    ) -> Message:
        """Wait for the next message, which has to be of `kind`; an error message is raised.

        A peer that is at work says `progress`, with ever less left to do: then its time begins anew.

        Args:
            kind: of message.
            timeout_s: limit, if not the channel's own.
            max_bytes: that a message may have.
            ends: when, by `time.monotonic`, the first time ends that began before this call.
            late: a kind of which some may still come that nobody waits for any more.

        Raises:
            EngineLost: the peer is gone.
            TransferTimeout: no whole message came within the timeout.
            Fp8SyncError: what the peer reported, or a message out of turn.
        """
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        ends = time.monotonic() + limit_s if ends is None else ends
        message, before = self._due(kind, limit_s, max_bytes, ends), math.inf
        while (said := message.get("type")) == "progress" or (late and said == late):
            if said == "progress":
                left = message.get("left")
                if not isinstance(left, int) or not 0 <= left < before:
                    raise Fp8SyncError(
                        f"{self.peer} said progress with {left!r} left after {before}"
                    )
                ends, before = time.monotonic() + limit_s, left
            message = self._due(kind, limit_s, max_bytes, ends)
        if message.get("type") == "error":
            raise self._told(message.get("error"))
        if message.get("type") != kind:
            raise Fp8SyncError(f"{self.peer} sent {message.get('type')!r}, expected {kind!r}")
        return message

    def drain(self) -> None:
        """Read what the peer has said and nobody waits for, for what is to be heeded in it."""
        with suppress(Fp8SyncError):
            while True:
                ends = time.monotonic() + _DRAIN_S
                self._heeded(self._next("stopped", _DRAIN_S, _MAX_BYTES, ends))

    def progress(self, left: int) -> None:
        """Tell a peer that waits how much there is left to do; less each time."""
        self.try_send({"type": "progress", "left": left})

    def hung_up(self) -> bool:
        """Whether the peer, from which nothing is expected now, has closed the connection."""
        poll = select.poll()
        try:
            # Its last words may not have been read.
            poll.register(self._sock, select.POLLIN | select.POLLRDHUP)
            ((_, found),) = poll.poll(0) or ((0, 0),)
            if found & ~select.POLLIN:
                return True
            return bool(found) and not self._sock.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):  # closed here, or reset by the peer
            return True

    def deafen(self) -> None:
        """Hear what has arrived, and nothing after it; a thread that waits for more wakes with `EngineLost`."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close the connection; the peer sees it as gone."""
        # Shutdown first: close alone does not wake a thread that waits in recv.
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _due(self, kind: str, limit_s: float, max_bytes: int, ends: float) -> Message:
        while self._heeded(message := self._next(kind, limit_s, max_bytes, ends)):
            pass
        return message

    def _heeded(self, message: Message) -> bool:
        if message.get("type") != "stopped":
            return False
        self.heed(message)
        return True

    def _next(self, kind: str, limit_s: float, max_bytes: int, ends: float) -> Message:
        (size,) = _LENGTH.unpack(self._read(_LENGTH.size, kind, ends, limit_s))
        packed, size = bool(size & _PACKED), size & ~_PACKED
        if size > max_bytes:
            raise Fp8SyncError(f"{self.peer} announced a message of {size} bytes")
        data = self._read(size, kind, ends, limit_s)
        if packed:
            data = self._unpacked(data, max_bytes)
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            text = f"{self.peer} sent what is not JSON, expected {kind!r}: {error}"
            raise Fp8SyncError(text) from error
        if not isinstance(message, dict):
            raise Fp8SyncError(f"{self.peer} sent {type(message).__name__}, expected an object")
        if "attached" in message:
            sizes = message["attached"]
            if not _are_sizes(sizes) or sum(sizes) > max_bytes:
                raise Fp8SyncError(f"{self.peer} attached {sizes!r} bytes to {kind!r}")
            message["attached"] = [self._read(n, kind, ends, limit_s) for n in sizes]
        return message

    def _unpacked(self, data: bytes, max_bytes: int) -> bytes:
        """What was compressed; never makes more than `max_bytes` of it."""
        unpack = zlib.decompressobj()
        try:
            whole = unpack.decompress(data, max_bytes + 1)
        except zlib.error as error:
            raise Fp8SyncError(f"{self.peer} sent what cannot be decompressed: {error}") from error
        if not unpack.eof or unpack.unused_data or len(whole) > max_bytes:
            raise Fp8SyncError(
                f"{self.peer} sent a compressed message that is cut off, goes on after its end, "
                f"or is of more than {max_bytes} bytes"
            )
        return whole

    def _told(self, error: Any) -> Fp8SyncError:
        if not isinstance(error, dict) or not isinstance(error.get("violations", []), list):
            return Fp8SyncError(f"{self.peer} reported an error of no known form")
        return from_wire(error)

    def _read(self, size: int, kind: str, ends: float, limit_s: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            # A deadline for the whole, so that a peer that drips bytes is late as well.
            try:
                self._sock.settimeout(max(ends - time.monotonic(), 1e-3))
                with waiting():
                    piece = self._sock.recv(min(size - len(data), 1 << 20))
            except TimeoutError as error:
                raise self._late(f"sent no {kind!r}", limit_s) from error
            except OSError as error:
                raise EngineLost(f"{self.peer} is gone: {error}") from error
            if not piece:
                raise EngineLost(f"{self.peer} closed the connection; expected {kind!r}")
            data += piece
        return bytes(data)

    def _late(self, what: str, limit_s: float) -> TransferTimeout:
        return TransferTimeout(f"{self.peer} {what} within {limit_s:g} s")


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)


class Listener:
    """Where workers join a link.

    Args:
        token: what a worker has to present.
        host: address to bind; loopback by default.
        timeout_s: default timeout of accepting and of the channels.
    """

    def __init__(self, token: str, host: str = "127.0.0.1", timeout_s: float = 60.0) -> None:
        self._token = token
        self._timeout_s = timeout_s
        self._sock = socket.create_server((host, 0))
        self.host, self.port = self._sock.getsockname()[:2]

    def accept(self, peer: str) -> Channel:
        """Wait for one worker with the right token; others are turned away.

        Raises:
            TransferTimeout: nobody came within the timeout.
            EngineLost: closed meanwhile, or before.
        """
        ends = time.monotonic() + self._timeout_s
        while True:
            try:
                self._sock.settimeout(max(ends - time.monotonic(), 1e-3))
                sock, _ = self._sock.accept()
            except TimeoutError as error:
                text = f"{peer} did not join within {self._timeout_s:g} s"
                raise TransferTimeout(text) from error
            except OSError as error:
                raise EngineLost(f"{peer} did not join: {error}") from error
            channel = Channel(sock, peer, self._timeout_s)
            if self._admits(channel, min(_HELLO_S, max(ends - time.monotonic(), 1e-3))):
                return channel
            channel.close()

    def _admits(self, channel: Channel, timeout_s: float) -> bool:
        try:
            token = channel.receive("hello", timeout_s, _HELLO_BYTES).get("token")
        except Fp8SyncError:
            return False
        if not isinstance(token, str):
            return False
        return hmac.compare_digest(token.encode(errors="replace"), self._token.encode())

    def close(self) -> None:
        """Stop listening; a thread that waits in `accept` wakes with `EngineLost`."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
