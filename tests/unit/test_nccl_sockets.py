"""Which interface NCCL is told to take; that it does is for tests/multigpu."""

from __future__ import annotations

import os

import pytest

from fp8sync.transport.nccl import sockets
from fp8sync.transport.rendezvous import Rendezvous, is_loopback

VARIABLE = "NCCL_SOCKET_IFNAME"


def test_loopback_while_a_communicator_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with sockets(loopback=True):
        assert os.environ[VARIABLE] == "=lo"
    assert VARIABLE not in os.environ
    with pytest.raises(OSError, match="no peer"), sockets(loopback=True):
        raise OSError("no peer")
    assert VARIABLE not in os.environ
    with sockets(loopback=False):
        assert VARIABLE not in os.environ


def test_the_users_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "eth7")
    with sockets(loopback=True):
        assert os.environ[VARIABLE] == "eth7"
    assert os.environ[VARIABLE] == "eth7"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
    ],
)
def test_what_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_link_is_on_loopback_by_default() -> None:
    assert is_loopback(Rendezvous("127.0.0.1", 5.0).host)
