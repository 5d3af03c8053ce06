"""Long messages of the control channel are compressed."""

from __future__ import annotations

import json
import socket
import struct
import zlib
from typing import TYPE_CHECKING

import pytest

from fp8sync.errors import Fp8SyncError

if TYPE_CHECKING:
    from fp8sync.control import Channel


def packed(data: bytes) -> bytes:
    return struct.pack("<I", 1 << 31 | len(data)) + data


def test_a_long_message_is_compressed(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    said = {"type": "manifest", "manifest": ["model.layers.0.mlp.experts.0.up_proj"] * 100_000}
    channel.send(said)
    size = struct.unpack("<I", peer.recv(4, socket.MSG_WAITALL))[0]
    assert size >> 31 == 1
    assert size & ~(1 << 31) < 40_000
    data = peer.recv(size & ~(1 << 31), socket.MSG_WAITALL)
    assert json.loads(zlib.decompress(data)) == said
    peer.sendall(packed(data))
    assert channel.receive("manifest") == said


@pytest.mark.parametrize("room", [-1, 0])
def test_no_more_is_decompressed_than_a_message_may_have(
    room: int, pair: tuple[Channel, socket.socket]
) -> None:
    channel, peer = pair
    data = json.dumps({"type": "hello", "token": "0" * 100_000}).encode()
    peer.sendall(packed(zlib.compress(data)))
    if room < 0:
        with pytest.raises(Fp8SyncError, match=f"is of more than {len(data) - 1} bytes"):
            channel.receive("hello", max_bytes=len(data) - 1)
    else:
        assert channel.receive("hello", max_bytes=len(data)) == json.loads(data)
