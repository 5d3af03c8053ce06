"""uint8 messages between processes over torch.distributed's gloo, apart from any default group.

The group is built from a store and a device of its own, so it lives beside whatever process groups
the trainer and the engine already have. Both the store and gloo's pairs bind the address given.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from fp8sync.errors import EngineLost, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

dist: Any = torch.distributed  # its classes of stores and groups are not in its stubs

__all__ = ["GlooGroup", "Rendezvous"]


class Rendezvous:
    """The store through which a group's members find each other; held by the link.

    Args:
        host: address to bind; loopback unless told otherwise.
        timeout_s: how long a member waits for another.
    """

    def __init__(self, host: str, timeout_s: float) -> None:
        # The store would bind every interface by itself; a socket made here binds only `host`.
        listener = socket.create_server((host, 0))
        self.host, self.port = listener.getsockname()[:2]
        self.timeout_s = timeout_s
        self.store = dist.TCPStore(
            self.host,
            self.port,
            None,
            True,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


class GlooGroup:
    """A member of a gloo group.

    Args:
        store: the link's store, or one connected to it (see `join`).
        rank: this member.
        size: all members.
        host: this member's address, for gloo's own connections.
        timeout_s: limit of every wait.
        names: what to call each rank in errors.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        host: str,
        timeout_s: float,
        names: dict[int, str] | None = None,
    ) -> None:
        self._names = names or {}
        self._timeout = timedelta(seconds=timeout_s)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = self._timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        try:
            self._group = dist.ProcessGroupGloo(store, rank, size, options)
        except RuntimeError as error:
            raise TransferTimeout(f"the gloo group of {size} was not complete: {error}") from error

    @classmethod
    def join(cls, host: str, port: int, rank: int, size: int, timeout_s: float) -> GlooGroup:
        """Join the group whose rendezvous is at `host:port`."""
        wait = timedelta(seconds=timeout_s)
        store = dist.TCPStore(host, port, None, False, wait, wait_for_workers=False)
        own = socket.gethostbyname(host) if host in {"127.0.0.1", "localhost"} else _own_host(host)
        return cls(store, rank, size, own, timeout_s, {0: f"trainer at {host}"})

    def send(self, message: torch.Tensor, to: int) -> None:
        """Send a contiguous uint8 CPU tensor; returns when it may be reused.

        Raises:
            EngineLost: the peer is gone.
            TransferTimeout: the peer did not take it in time.
        """
        self._wait(lambda: self._group.send([message], to, 0), to, "take")

    def receive(self, message: torch.Tensor, source: int) -> None:
        """Fill a contiguous uint8 CPU tensor from `source`. Errors as for `send`."""
        self._wait(lambda: self._group.recv([message], source, 0), source, "send")

    def _wait(self, start: Callable[[], Any], rank: int, verb: str) -> None:
        peer = self._names.get(rank, f"rank {rank}")
        try:
            start().wait(self._timeout)
        except RuntimeError as error:
            text = str(error)
            if "imed out" in text or "imeout" in text:
                limit = self._timeout.total_seconds()
                raise TransferTimeout(
                    f"{peer} did not {verb} a bucket within {limit:g} s"
                ) from error
            raise EngineLost(f"{peer} is gone: {text.splitlines()[0]}") from error


def _own_host(host: str) -> str:
    """Return the local address from which `host` is reached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
