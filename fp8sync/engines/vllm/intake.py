"""What a worker has to receive, and what every way in can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from fp8sync.control import Channel
    from fp8sync.engines.vllm.staging import Staging
    from fp8sync.manifest import Manifest
    from fp8sync.plan import Plan
    from fp8sync.wire.payload import Storages

__all__ = ["Intake", "Receiver"]


class Receiver(Protocol):
    """One way in."""

    def receive(self, version: int, staged: Storages) -> None:
        """Fill `staged` with a version's bytes and verify them.

        Raises:
            CorruptBucket: they are not the bytes that the plan expects.
            TransferTimeout, EngineLost: a trainer rank fell silent, or is gone.
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
