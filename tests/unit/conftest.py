"""Hypothesis for this folder: the same examples in every run, no deadline on a busy machine; fixtures of several files."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from fp8sync.control import Channel

if TYPE_CHECKING:
    from collections.abc import Iterator

settings.register_profile(
    "unit",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unit")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `torch.compile` wrap a module; other tests have it return the module itself."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the bare socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    channel = Channel(accepted, "engine rank 7", timeout_s=5.0)
    yield channel, theirs
    channel.close()
    theirs.close()
