"""How a version's bytes come into staging memory: in buckets, or written there by the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8sync.errors import CorruptBucket, Fp8SyncError
from fp8sync.payload import Storages, unpack
from fp8sync.plan import Bucket, Plan, fill_buckets
from fp8sync.transport import GlooGroup
from fp8sync.wire import ABORT, HEADER_BYTES, Header
from fp8sync_kernels import digest

if TYPE_CHECKING:
    from fp8sync.control import Channel
    from fp8sync.engines.vllm.staging import Staging

__all__ = ["BucketReceiver", "Receiver", "StagingReceiver"]


class Receiver(Protocol):
    """One way in."""

    def receive(self, version: int, staged: Storages) -> None:
        """Fill `staged` with a version's bytes and verify them.

        Raises:
            CorruptBucket: they are not the bytes that the plan expects.
            TransferTimeout, EngineLost: a trainer rank fell silent, or is gone.
        """


class StagingReceiver:
    """Bytes that trainers on this host write by themselves; here they are only verified."""

    def __init__(self, channel: Channel, staging: Staging, plan: Plan, rank: int) -> None:
        self._channel, self._staging = channel, staging
        staging.expect(plan.to_rank(rank), rank)

    def receive(self, version: int, staged: Storages) -> None:  # noqa: ARG002  (see Receiver)
        """Wait for the word that everything is written, and compare digests."""
        written = self._channel.receive("written")["digests"]
        if written is None:
            raise Fp8SyncError("a trainer rank stopped writing")
        self._staging.verify(written)


class BucketReceiver:
    """Buckets over gloo."""

    def __init__(
        self,
        channel: Channel,
        place: dict[str, Any],
        plan: Plan,
        rank: int,
        bucket_bytes: int,
        device: torch.device,
    ) -> None:
        self._rank, self._device = rank, device
        self._group = GlooGroup.join(
            place["host"], place["port"], place["rank"], place["size"], channel.timeout_s
        )
        self._buckets = fill_buckets(plan.to_rank(rank), bucket_bytes)
        self._plan = bytes.fromhex(plan.digest(rank))[:16]
        size = max((b.nbytes for b in self._buckets), default=0)
        self._message = torch.empty(HEADER_BYTES + size, dtype=torch.uint8)

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
