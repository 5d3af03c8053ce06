"""One trainer rank's share of a refit: quantize, pack, send, bucket by bucket."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import Fp8SyncError
from fp8sync.plan import Bucket, in_turns
from fp8sync.sending.alike import read_by
from fp8sync.sending.share import Sent, Told, named_error, own_buckets
from fp8sync.transport.gloo import GlooGroup
from fp8sync.waiting import device_work
from fp8sync.wire.header import ABORT, HEADER_BYTES, Header
from fp8sync.wire.payload import Amax, PartReport, Storages, pack
from fp8sync_kernels import digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8sync.sending.share import Share
    from fp8sync.transport import Choice

__all__ = ["Sender"]


class Sender:
    """Sends one source rank's buckets to all engine workers, in turn.

    Args:
        share: what to send.
        group: the transport.
        members: number of every engine rank in the group.
        bucket_bytes: payload of a message.
    """

    def __init__(
        self, share: Share, group: GlooGroup, members: Mapping[int, int], bucket_bytes: int
    ) -> None:
        rank = share.rank
        self._share, self._rank, self._group, self._members = share, rank, group, members
        turns = in_turns(own_buckets(share, members, bucket_bytes))
        self._buckets = [bucket for turn in turns for bucket in turn]
        self._names = read_by(part.copy for b in self._buckets for part in b.parts)
        self._plans = {r: share.plan_id(r) for r in {b.destination_rank for b in self._buckets}}
        largest = max((b.nbytes for b in self._buckets), default=0)
        self._message = torch.zeros(HEADER_BYTES + largest, dtype=torch.uint8)

    @classmethod
    def open(cls, choice: Choice, shares: Sequence[Share]) -> list[Sender]:
        """Join the group of an invitation, and open a way for each portion of a version."""
        group = GlooGroup.join(choice, shares[0].timeout_s)
        members = dict(choice["members"])
        senders = [cls(share, group, members, choice["bucket_bytes"]) for share in shares]
        largest = max((s._message for s in senders), key=torch.Tensor.numel)
        for sender in senders:  # one portion at a time
            sender._message = largest
        return senders

    def close(self) -> None:
        """The group ends with the last reference to it."""

    def send(self, version: int, told: Told) -> Sent:  # noqa: ARG002  (headers have the digests)
        """Send the weights as they are now; never raises, so that the vote always takes place."""
        sent = Sent(self._rank)
        storages: Storages = {}
        over: set[int] = set()
        began = time.perf_counter()
        try:
            storages = self._share.read(self._names)
        # Whatever stops reading or packing, the workers that wait for a bucket have to hear of it.
        except Exception as error:  # noqa: BLE001
            sent.error = named_error(error, self._rank)
        sent.quantize_s = time.perf_counter() - began
        for number, bucket in enumerate(self._buckets, 1):
            if bucket.destination_rank in over:
                continue
            message = self._message[: HEADER_BYTES + bucket.nbytes]
            began = time.perf_counter()
            value = 0
            try:
                if sent.error is None:
                    amax = self._share.exchange.amax
                    with device_work(message.device):
                        sent.parts += _pack(bucket, storages, message[HEADER_BYTES:], amax)
                        value = digest(message[HEADER_BYTES:])
            except Exception as error:  # noqa: BLE001
                sent.error = named_error(error, self._rank)
            if sent.error is not None:
                over.add(bucket.destination_rank)
            self._write_header(message, bucket, version, value, void=sent.error is not None)
            packed = time.perf_counter()
            try:
                self._group.send(message, self._members[bucket.destination_rank])
            except Fp8SyncError as error:
                sent.error = sent.error or error
                over.add(bucket.destination_rank)
            sent.quantize_s += packed - began
            sent.send_s += time.perf_counter() - packed
            sent.bytes += message.numel()
            self._share.progress(len(self._buckets) - number)
        return sent

    def _write_header(
        self, message: torch.Tensor, bucket: Bucket, version: int, value: int, *, void: bool
    ) -> None:
        header = Header(
            index=bucket.index,
            version=version,
            payload_bytes=bucket.nbytes,
            digest=value,
            plan=self._plans[bucket.destination_rank],
            parts=len(bucket.parts),
            flags=ABORT if void else 0,
        )
        message[:HEADER_BYTES] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)


def _pack(
    bucket: Bucket, storages: Storages, payload: torch.Tensor, amax: Amax
) -> list[PartReport]:
    device = storages[bucket.parts[0].copy.source_at.storage].device
    if device.type == "cpu":
        payload.zero_()
        return pack(bucket, storages, payload, amax)
    packed = torch.zeros(bucket.nbytes, dtype=torch.uint8, device=device)
    reports = pack(bucket, storages, packed, amax)
    payload.copy_(packed)
    return reports
