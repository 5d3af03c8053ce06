"""Buckets over gloo, one at a time: from trainer ranks, then from worker to worker of a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8sync.engines.vllm.intake import Faults
from fp8sync.errors import EngineLost, Fp8SyncError, PeerFailed, TransferTimeout
from fp8sync.plan import Bucket, fill_buckets, in_turns
from fp8sync.plan.forward import forwarding_digest, handed_on, neighbours
from fp8sync.transport import GlooGroup
from fp8sync.wire.header import ABORT, HEADER_BYTES, Header
from fp8sync.wire.payload import Storages, pack, unpack
from fp8sync_kernels import digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8sync.engines.vllm.intake import Intake
    from fp8sync.transport import Choice

__all__ = ["BucketReceiver"]


class BucketReceiver:
    """One worker's way in.

    It takes buckets in turns of one from every trainer rank: each sends its next one while the others' are
    taken, so no rank waits for longer than a turn. Forwarded ones go in turns, too, sorted by forwarder and
    receiver: an order that all workers keep, so nobody waits in a circle.

    Args:
        intake: what to receive.
        group: the transport; trainer ranks have their own ranks as numbers.
        members: number of every engine rank in the group.
        bucket_bytes: payload of a message.
    """

    def __init__(
        self, intake: Intake, group: GlooGroup, members: Mapping[int, int], bucket_bytes: int
    ) -> None:
        self._intake, self._rank, self._group = intake, intake.rank, group
        self._members = members
        plan = intake.plan
        self._fed = _in_order(fill_buckets(plan.fed(self._rank), bucket_bytes))
        self._digest = bytes.fromhex(plan.digest(self._rank))[:16]
        self._digests: dict[tuple[int, int], bytes] = {}
        forwarded: list[Bucket] = []
        for route in neighbours(plan, self._rank):
            copies = handed_on(plan, *route)
            self._digests[route] = forwarding_digest(copies)[:16]
            forwarded += fill_buckets(copies, bucket_bytes)
        self._forwarded = _in_order(forwarded)
        size = max((b.nbytes for b in (*self._fed, *self._forwarded)), default=0)
        self._message = torch.zeros(HEADER_BYTES + size, dtype=torch.uint8)

    @classmethod
    def open(cls, choice: Choice, intakes: Sequence[Intake]) -> list[BucketReceiver]:
        """Join the group of an invitation, and open a way for each portion of a version."""
        group = GlooGroup.join(choice, intakes[0].channel.timeout_s)
        about = group, dict(choice["members"]), choice["bucket_bytes"]
        receivers = [cls(intake, *about) for intake in intakes]
        largest = max((r._message for r in receivers), key=torch.Tensor.numel)
        for receiver in receivers:  # one portion at a time
            receiver._message = largest
        return receivers

    def close(self) -> None:
        """The group ends with the last reference to it."""

    def receive(self, version: int, staged: Storages) -> None:
        """Take every bucket of the trainer off the wire, verify it and unpack it."""
        faults = Faults()
        silent: set[int] = set()
        for bucket in self._fed:
            if bucket.source_rank in silent:
                continue
            used = self._room_of(bucket)
            try:
                self._group.receive(used, bucket.source_rank)
            except (TransferTimeout, EngineLost) as error:
                # The other ranks still send, and shall not wait for a worker that takes nothing.
                silent.add(bucket.source_rank)
                faults.add(error)
                continue
            try:
                if _is_void(used):
                    silent.add(bucket.source_rank)
                    faults.add(PeerFailed(f"trainer rank {bucket.source_rank} stopped sending"))
                elif not faults:
                    self._check(used, bucket, version, self._digest, "")
                    unpack(bucket, used[HEADER_BYTES:].to(self._intake.device), staged)
            # What follows is taken off the wire, so that the senders are not left waiting.
            except Exception as error:  # noqa: BLE001
                faults.add(error)
        faults.settle()

    def forward(self, version: int, staged: Storages) -> None:
        """Hand on and take, bucket by bucket; a peer that is lost is passed over from then on."""
        faults = Faults()
        lost: set[int] = set()
        for number, bucket in enumerate(self._forwarded, 1):
            away = bucket.source_rank == self._rank
            peer = bucket.destination_rank if away else bucket.source_rank
            if peer in lost:
                continue
            used = self._room_of(bucket)
            try:
                if away:
                    self._write(used, bucket, version, staged, faults)
                    self._group.send(used, self._members[peer])
                else:
                    self._group.receive(used, self._members[peer])
                    self._take(used, bucket, version, staged)
            except (TransferTimeout, EngineLost) as error:
                lost.add(peer)
                faults.add(error)
            # Peers still send, and wait for what this worker hands on.
            except Exception as error:  # noqa: BLE001
                faults.add(error)
            self._intake.channel.progress(len(self._forwarded) - number)
        faults.settle()

    def _take(self, used: torch.Tensor, bucket: Bucket, version: int, staged: Storages) -> None:
        if _is_void(used):
            raise PeerFailed(f"engine rank {bucket.source_rank} stopped forwarding")
        plan = self._digests[bucket.source_rank, bucket.destination_rank]
        self._check(used, bucket, version, plan, f" from engine rank {bucket.source_rank}")
        unpack(bucket, used[HEADER_BYTES:].to(self._intake.device), staged)

    def _write(
        self,
        used: torch.Tensor,
        bucket: Bucket,
        version: int,
        staged: Storages,
        faults: Faults,
    ) -> None:
        """Fill a message from staging memory; after a failure it is void, so that nobody is left waiting."""
        payload = used[HEADER_BYTES:]
        if not faults:
            try:
                payload.zero_()
                packed = payload.to(self._intake.device)
                pack(bucket, staged, packed)
                payload.copy_(packed)
            # Whatever it is, the peers wait for a message.
            except Exception as error:  # noqa: BLE001
                text = (
                    f"engine rank {self._rank} could not forward: {type(error).__name__}: {error}"
                )
                faults.add(Fp8SyncError(text))
        void = bool(faults)
        plan = self._digests[bucket.source_rank, bucket.destination_rank]
        value = 0 if void else digest(payload)
        header = _header(bucket, version, value, plan, ABORT if void else 0)
        used[:HEADER_BYTES] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)

    def _check(
        self, used: torch.Tensor, bucket: Bucket, version: int, plan: bytes, source: str
    ) -> None:
        found = Header.unpack(bytes(used[:HEADER_BYTES].numpy()))
        where = f"engine rank {self._rank}, bucket {bucket.index}{source}"
        found.check(_header(bucket, version, digest(used[HEADER_BYTES:]), plan), where)

    def _room_of(self, bucket: Bucket) -> torch.Tensor:
        return self._message[: HEADER_BYTES + bucket.nbytes]


def _in_order(buckets: Iterable[Bucket]) -> list[Bucket]:
    turns = in_turns(sorted(buckets, key=lambda b: (b.source_rank, b.destination_rank)))
    return [bucket for turn in turns for bucket in turn]


def _is_void(message: torch.Tensor) -> bool:
    return bool(Header.unpack(bytes(message[:HEADER_BYTES].numpy())).flags & ABORT)


def _header(bucket: Bucket, version: int, value: int, plan: bytes, flags: int = 0) -> Header:
    return Header(bucket.index, version, bucket.nbytes, value, plan, len(bucket.parts), flags)
