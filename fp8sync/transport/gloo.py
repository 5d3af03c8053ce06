"""uint8 messages between processes over torch.distributed's gloo, apart from any default group.

The group is built from a store and a device of its own, so it lives beside whatever process groups
the trainer and the engine already have. Both the store and gloo's pairs bind the address given.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from fp8sync.errors import EngineLost, TransferTimeout
from fp8sync.transport.rendezvous import own_host, reach
from fp8sync.waiting import waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8sync.transport.group import Message
    from fp8sync.transport.invitation import Choice

dist: Any = torch.distributed  # its classes of stores and groups are not in its stubs

__all__ = ["GlooGroup"]

Pending = tuple[Any, int, str]
"""torch's handle of one message, its peer, and what the peer has to do."""


class GlooGroup:
    """A member of a gloo group.

    Args:
        store: connected to the link's rendezvous.
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
    def join(cls, choice: Choice, timeout_s: float) -> GlooGroup:
        """Join the group that trainer rank 0 invites to.

        Raises:
            TransferTimeout: nobody answers at that address, or a member did not come in time.
        """
        host, names = str(choice["host"]), list(choice["names"])
        store = reach(host, int(choice["port"]), timeout_s)
        number = int(choice["rank"])
        return cls(store, number, len(names), own_host(host), timeout_s, dict(enumerate(names)))

    def send(self, message: torch.Tensor, to: int) -> None:
        """Send a contiguous uint8 CPU tensor; returns when it may be reused.

        Raises:
            EngineLost: the peer is gone.
            TransferTimeout: the peer did not take it in time.
        """
        self._wait(lambda: self._group.send([message], to, 0), self._name(to), "take a bucket")

    def receive(self, message: torch.Tensor, source: int) -> None:
        """Fill a contiguous uint8 CPU tensor from `source`. Errors as for `send`."""
        name = self._name(source)
        self._wait(lambda: self._group.recv([message], source, 0), name, "send a bucket")

    def maximum(self, values: torch.Tensor) -> None:
        """Replace `values`, float32 on any device, by their maximum over all members.

        Raises:
            EngineLost: a member is gone.
            TransferTimeout: a member did not take part in time.
        """
        host = values.cpu()
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        everyone = "one of " + ", ".join(self._names.values())
        self._wait(lambda: self._group.allreduce([host], options), everyone, "join in a maximum")
        if host is not values:
            values.copy_(host)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[Pending]:
        """See `Group`; messages of this process's memory."""
        begun = [(self._group.send([m], to, 0), to, "take a bucket") for m, to in sends]
        return begun + [(self._group.recv([m], a, 0), a, "send a bucket") for m, a in receives]

    def fence(self, ticket: list[Pending]) -> None:
        """See `Group`; there is no stream to hold back."""
        for work, peer, what in ticket:
            self._wait(lambda work=work: work, self._name(peer), what)  # type: ignore[misc]
        ticket.clear()

    def wait(self, ticket: list[Pending], peers: Sequence[int], verb: str) -> None:  # noqa: ARG002
        """See `Group`."""
        self.fence(ticket)

    def close(self) -> None:
        """The group ends with the last reference to it."""

    def _name(self, rank: int) -> str:
        return self._names.get(rank, f"rank {rank}")

    def _wait(self, start: Callable[[], Any], peer: str, what: str) -> None:
        try:
            with waiting():
                start().wait(self._timeout)
        except RuntimeError as error:
            text = str(error)
            if "imed out" in text or "imeout" in text:
                limit = self._timeout.total_seconds()
                raise TransferTimeout(f"{peer} did not {what} within {limit:g} s") from error
            raise EngineLost(f"{peer} is gone: {text.splitlines()[0]}") from error
