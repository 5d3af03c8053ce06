"""How a version's bytes come into staging memory: in buckets, or written there by the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8sync.engines.vllm.buckets import BucketReceiver
from fp8sync.engines.vllm.golden import GoldenReceiver
from fp8sync.engines.vllm.grouped import GroupReceiver
from fp8sync.engines.vllm.intake import Faults
from fp8sync.errors import PeerFailed
from fp8sync.sending.writer import PARTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8sync.engines.vllm.intake import Intake, Receiver
    from fp8sync.transport import Choice
    from fp8sync.wire.payload import Storages

__all__ = ["open_receivers"]


class StagingReceiver:
    """Bytes that trainers on this host write by themselves; here they are only verified."""

    def __init__(self, intake: Intake) -> None:
        self._channel = intake.channel
        # Of its own: on the engine's, every answer would wait for the steps that are queued there.
        cuda = intake.device.type == "cuda"
        self._stream = torch.cuda.Stream(intake.device) if cuda else None
        self._expected = intake.staging.expect(intake.plan.to_rank(intake.rank), intake.rank)

    @classmethod
    def open(cls, choice: Choice, intakes: Sequence[Intake]) -> list[StagingReceiver]:  # noqa: ARG003
        """Prepare to verify each portion of a version."""
        return [cls(intake) for intake in intakes]

    def forward(self, version: int, staged: Storages) -> None:
        """Nothing is forwarded: trainers write to every worker."""

    def close(self) -> None:
        """Nothing is held."""

    def receive(self, version: int, staged: Storages) -> None:  # noqa: ARG002  (see Receiver)
        """Wait for the word that a part is written, and compare digests while the next is."""
        faults = Faults()
        self._expected.begin()
        for _ in range(PARTS):
            # Trainer rank 0 may itself wait that long, for another rank.
            said = self._channel.receive("written", 2 * self._channel.timeout_s)
            if not said["whole"]:
                faults.add(PeerFailed("a trainer rank stopped writing"))
            if not faults:
                try:
                    with torch.cuda.stream(self._stream):
                        self._expected.verify(said["attached"])
                # Whatever it is, what is still said has to be heard.
                except Exception as error:  # noqa: BLE001
                    faults.add(error)
        faults.settle()
        self._expected.end()


_WAYS: dict[str, Callable[[Choice, Sequence[Intake]], Sequence[Receiver]]] = {
    "ipc": StagingReceiver.open,
    "nccl": GroupReceiver.open,
    "gloo": BucketReceiver.open,
    "golden": GoldenReceiver.open,
}


def open_receivers(choice: Choice, intakes: Sequence[Intake]) -> Sequence[Receiver]:
    """Return a worker's way in for each portion of a version, from the invitation it got."""
    return _WAYS[choice["kind"]](choice, intakes)
