"""Where the members of a group find each other: a store that trainer rank 0 holds for the link."""

from __future__ import annotations

import socket
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import torch.distributed

from fp8sync.errors import TransferTimeout, UnsupportedLayout

dist: Any = torch.distributed  # its classes of stores are not in its stubs

__all__ = ["Rendezvous", "bound_address", "is_loopback", "own_host", "reach"]


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


def reach(host: str, port: int, timeout_s: float) -> Any:
    """Return a store connected to the rendezvous at `host:port`.

    Raises:
        TransferTimeout: nobody answers there in time.
    """
    wait = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(host, port, None, False, wait, wait_for_workers=False)
    except RuntimeError as error:
        text = f"the rendezvous at {host}:{port} did not answer within {timeout_s:g} s"
        raise TransferTimeout(text) from error


def is_loopback(host: str) -> bool:
    """Whether a bound address is one that this host alone can reach."""
    return ip_address(host).is_loopback


def bound_address(host: str) -> str:
    """Return the IPv4 address that a rendezvous on `host` binds, which is what workers are told.

    Raises:
        UnsupportedLayout: `host` is no address of this host, or stands for all of them.
    """
    try:
        with socket.create_server((host, 0)) as probe:
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise UnsupportedLayout(
            f"the rendezvous cannot bind {host!r}: expected an address or name of this host, found {error}"
        ) from error
    if ip_address(address).is_unspecified:
        raise UnsupportedLayout(
            f"the rendezvous would bind every interface: expected one address of this host, found {host!r}"
        )
    return address


def own_host(host: str) -> str:
    """Return the local address from which `host` is reached."""
    if host in {"127.0.0.1", "localhost"}:
        return socket.gethostbyname(host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
