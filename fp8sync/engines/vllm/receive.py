"""How a version's bytes come into staging memory: in buckets, or written there by the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from fp8sync.engines.vllm.golden import GoldenReceiver
from fp8sync.engines.vllm.grouped import GroupReceiver
from fp8sync.errors import CorruptBucket, Fp8SyncError
from fp8sync.plan import Bucket, fill_buckets, in_turns
from fp8sync.sending.writer import PARTS
from fp8sync.transport import GlooGroup
from fp8sync.wire.header import ABORT, HEADER_BYTES, Header
from fp8sync.wire.payload import Storages, unpack
from fp8sync_kernels import digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8sync.control import Channel
    from fp8sync.engines.vllm.staging import Staging
    from fp8sync.manifest import Manifest
    from fp8sync.plan import Plan
    from fp8sync.transport import Choice

__all__ = ["Intake", "Receiver", "open_receiver"]


class Receiver(Protocol):
    """One way in."""

    def receive(self, version: int, staged: Storages) -> None:
        """Fill `staged` with a version's bytes and verify them.

        Raises:
            CorruptBucket: they are not the bytes that the plan expects.
            TransferTimeout, EngineLost: a trainer rank fell silent, or is gone.
        """

    def close(self) -> None:
        """Free what the way holds; a `receive` under way ends with an error."""


@dataclass(frozen=True)
class Intake:
    """What one worker has to receive, and where.

    Args:
        channel: connected to the trainer's link.
        staging: this worker's staging memory.
        held: the boxes of all trainer ranks.
        wanted: the boxes of this worker.
        plan: the agreed plan, of this worker at least.
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


class StagingReceiver:
    """Bytes that trainers on this host write by themselves; here they are only verified."""

    def __init__(self, choice: Choice, intake: Intake) -> None:  # noqa: ARG002  (see open_receiver)
        self._channel, self._staging = intake.channel, intake.staging
        intake.staging.expect(intake.plan.to_rank(intake.rank), intake.rank)

    def close(self) -> None:
        """Nothing is held."""

    def receive(self, version: int, staged: Storages) -> None:  # noqa: ARG002  (see Receiver)
        """Wait for the word that a part is written, and compare digests while the next is."""
        failure: Fp8SyncError | None = None
        for part in range(PARTS):
            written = self._channel.receive("written")["digests"]
            if written is None:
                failure = failure or Fp8SyncError("a trainer rank stopped writing")
            if failure is None:
                try:
                    self._staging.verify(part, written)
                except CorruptBucket as error:  # what is still said has to be heard
                    failure = error
        if failure is not None:
            raise failure


class BucketReceiver:
    """Buckets over gloo, one at a time.

    In turns of one from every trainer rank: each sends its next one while the others' are taken, so no
    rank waits for longer than a turn.

    Args:
        intake: what to receive.
        group: the transport; trainer ranks have their own ranks as numbers.
        bucket_bytes: payload of a message.
    """

    def __init__(self, intake: Intake, group: GlooGroup, bucket_bytes: int) -> None:
        self._rank, self._device, self._group = intake.rank, intake.device, group
        turns = in_turns(fill_buckets(intake.plan.to_rank(intake.rank), bucket_bytes))
        self._buckets = [bucket for turn in turns for bucket in turn]
        self._plan = bytes.fromhex(intake.plan.digest(intake.rank))[:16]
        size = max((b.nbytes for b in self._buckets), default=0)
        self._message = torch.empty(HEADER_BYTES + size, dtype=torch.uint8)

    @classmethod
    def open(cls, choice: Choice, intake: Intake) -> BucketReceiver:
        """Join the group of an invitation."""
        group = GlooGroup.join(choice, intake.channel.timeout_s)
        return cls(intake, group, choice["bucket_bytes"])

    def close(self) -> None:
        """The group ends with the last reference to it."""

    def receive(self, version: int, staged: Storages) -> None:
        """Take every bucket off the wire, verify it and unpack it."""
        failure: Fp8SyncError | None = None
        silent: set[int] = set()
        for bucket in self._buckets:
            if bucket.source_rank in silent:
                continue
            used = self._message[: HEADER_BYTES + bucket.nbytes]
            self._group.receive(used, bucket.source_rank)
            try:
                header = Header.unpack(bytes(used[:HEADER_BYTES].numpy()))
                if header.flags & ABORT:
                    silent.add(bucket.source_rank)
                    text = f"trainer rank {bucket.source_rank} stopped sending"
                    failure = failure or Fp8SyncError(text)
                    continue
                self._check(header, bucket, used, version)
            except CorruptBucket as error:
                # What follows is taken off the wire, so that the senders are not left waiting.
                failure = failure or error
            if failure is None:
                unpack(bucket, used[HEADER_BYTES:].to(self._device), staged)
        if failure is not None:
            raise failure

    def _check(self, header: Header, bucket: Bucket, message: torch.Tensor, version: int) -> None:
        expected = Header(
            index=bucket.index,
            version=version,
            payload_bytes=bucket.nbytes,
            digest=digest(message[HEADER_BYTES:]),
            plan=self._plan,
            parts=len(bucket.parts),
        )
        header.check(expected, f"engine rank {self._rank}, bucket {bucket.index}")


_WAYS: dict[str, Callable[[Choice, Intake], Receiver]] = {
    "ipc": StagingReceiver,
    "nccl": GroupReceiver.open,
    "gloo": BucketReceiver.open,
    "golden": GoldenReceiver.open,
}


def open_receiver(choice: Choice, intake: Intake) -> Receiver:
    """Return a worker's way in, from the invitation it got."""
    return _WAYS[choice["kind"]](choice, intake)
