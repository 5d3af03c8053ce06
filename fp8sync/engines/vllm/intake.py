"""What a worker has to receive, and what every way in can do."""

from __future__ import annotations

from dataclasses import dataclass
from traceback import clear_frames
from typing import TYPE_CHECKING, Protocol

from fp8sync.errors import Fp8SyncError, gathered

if TYPE_CHECKING:
    import torch

    from fp8sync.control import Channel
    from fp8sync.engines.vllm.staging import Staging
    from fp8sync.manifest import Manifest
    from fp8sync.plan import Plan
    from fp8sync.wire.payload import Storages

__all__ = ["Faults", "Intake", "Receiver"]


class Receiver(Protocol):
    """One way in."""

    def receive(self, version: int, staged: Storages) -> None:
        """Fill `staged` with a version's bytes and verify them.

        Whatever goes wrong is raised when all that is still sent has been taken, as senders wait for that.

        Raises:
            CorruptBucket: they are not the bytes that the plan expects.
            TransferTimeout, EngineLost: a trainer rank fell silent, or is gone.
            Exception: what else went wrong first, on this worker; an `Fp8SyncError` if a rank was lost, too.
        """

    def forward(self, version: int, staged: Storages) -> None:
        """Hand on what other workers of this node want as well, and take what they hand on, verified.

        Called after `receive`, on all of them, on the ways that have a plan with `via`.

        Raises:
            CorruptBucket: as `receive`.
            PeerFailed: another worker stopped.
            TransferTimeout, EngineLost: another worker fell silent, or is gone.
        """

    def close(self) -> None:
        """Free what the way holds; a call under way ends with an error."""


class Faults:
    """What goes wrong while messages arrive, kept until all of them are off the wire."""

    def __init__(self) -> None:
        self._first: Exception | None = None
        self._severed: Fp8SyncError | None = None

    def __bool__(self) -> bool:
        return self._first is not None

    def add(self, error: Exception) -> None:
        """Keep the first error, and the first that has left messages behind."""
        clear_frames(error.__traceback__)  # they hold tensors, perhaps where memory has run out
        self._first = self._first or error
        if self._severed is None and isinstance(error, Fp8SyncError) and error.severed:
            self._severed = error

    def settle(self) -> None:
        """Raise what is kept, if there is something."""
        first = self._first
        if first is None:
            return
        if self._severed is None or self._severed is first:
            raise first
        if not isinstance(first, Fp8SyncError):
            first = Fp8SyncError(f"{type(first).__name__}: {first}")
        raise gathered([first, self._severed]) from self._first


@dataclass(frozen=True)
class Intake:
    """What one worker has to receive, and where.

    Args:
        channel: connected to the trainer's link.
        staging: this worker's staging memory.
        held: the boxes of all trainer ranks.
        wanted: the boxes of this worker.
        plan: the agreed plan, of this worker at least; or one portion of it.
        rank: this worker among the engine's.
        device: where the model lives.
    """

    channel: Channel
    staging: Staging
    held: Manifest
    wanted: Manifest
    plan: Plan
    rank: int
    device: torch.device
