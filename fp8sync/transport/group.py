"""What a group of members does, whatever carries the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["Group", "Message", "Ticket"]

Message = tuple["torch.Tensor", int]
"""Contiguous uint8, and the number of the peer."""

Ticket = Any
"""An exchange under way, as its group knows it."""


class Group(Protocol):
    """One member's end of a group. A stream is that of the calling thread; a processor has none."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Ticket:
        """Begin to send and receive, after all work on the current stream.

        Every member that has a message with another begins its exchanges in the same order.

        Raises:
            TransferTimeout, EngineLost: naming the peers.
        """

    def fence(self, ticket: Ticket) -> None:
        """Let the current stream's later work wait for an exchange, without waiting here."""

    def wait(self, ticket: Ticket, peers: Sequence[int], verb: str) -> None:
        """Wait here until an exchange is done.

        Raises:
            TransferTimeout, EngineLost: naming `peers`, who did not `verb`; nothing of the group
                can be used any more.
        """

    def close(self) -> None:
        """End what is under way; later calls raise `EngineLost`."""
