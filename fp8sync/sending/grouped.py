"""One trainer rank's share of a refit, turn by turn: a bucket to every engine worker at once.

The k-th bucket of every route belongs to turn k, and every member takes its turns in order, so no two
members can wait for each other. While one turn is on the wire, one launch quantizes the next into the
other buffer. Per turn and per bucket the host makes a few calls, per tensor none.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8sync.plan import Bucket, in_turns
from fp8sync.sending.sender import Sent, Told, named_error, own_buckets
from fp8sync.transport.nccl import NcclGroup
from fp8sync.waiting import waiting
from fp8sync.wire.header import ABORT, HEADER_BYTES, Header
from fp8sync.wire.payload import PartReport
from fp8sync.wire.tables import PlacedBucket, pack_table
from fp8sync_kernels import Table, run_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8sync.sending.outgoing import Share
    from fp8sync.transport import Choice
    from fp8sync.transport.group import Group, Ticket
    from fp8sync.wire.payload import Storages

__all__ = ["AHEAD", "BUFFERS", "GroupSender", "lay_out"]

BUFFERS = 2
AHEAD = 4
"""Turns enqueued before the host waits: a stalled peer must not fill the GPU's launch queue."""

_FLAGS, _VERSION, _DIGEST = 1, 2, 4
"""Where a header has them, in 8-byte words (docs/wire-format.md); flags are the low half of theirs."""


@dataclass
class Turn:
    """Buckets that travel together, and the parts of a buffer that hold their messages."""

    buckets: list[PlacedBucket]
    messages: list[torch.Tensor]
    table: Table | None = None


def lay_out(turns: Sequence[Sequence[Bucket]], device: torch.device) -> list[Turn]:
    """Give every turn its place in one of two buffers, made here, each as large as the largest turn."""
    room = max((sum(map(_room, turn)) for turn in turns), default=0)
    buffers = [torch.empty(room, dtype=torch.uint8, device=device) for _ in turns[:BUFFERS]]
    found, slot = [], 0
    for number, turn in enumerate(turns):
        buffer = buffers[number % BUFFERS]
        placed, messages, offset = [], [], 0
        for bucket in turn:
            messages.append(buffer[offset : offset + HEADER_BYTES + bucket.nbytes])
            address = buffer.data_ptr() + offset + HEADER_BYTES
            placed.append(PlacedBucket(bucket, address, slice(slot, slot + len(bucket.parts))))
            slot += len(bucket.parts)
            offset += _room(bucket)
        found.append(Turn(placed, messages))
    return found


def _room(bucket: Bucket) -> int:
    return -(-(HEADER_BYTES + bucket.nbytes) // HEADER_BYTES) * HEADER_BYTES


class GroupSender:
    """Sends one source rank's buckets to all engine workers.

    Args:
        share: what to send; the weights are all on one device.
        group: the transport.
        members: number of every engine rank in the group.
        bucket_bytes: payload of a message.
    """

    def __init__(
        self, share: Share, group: Group, members: Mapping[int, int], bucket_bytes: int
    ) -> None:
        self._share, self._rank = share, share.rank
        self._group, self._members = group, members
        self._device = next(iter(share.source.storages().values())).device
        self._turns = lay_out(in_turns(own_buckets(share, members, bucket_bytes)), self._device)
        placed = [p for turn in self._turns for p in turn.buckets]
        self._tensors = [part.copy.tensor for p in placed for part in p.bucket.parts]
        plans = {rank: bytes.fromhex(share.plan.digest(rank))[:16] for rank in members}
        words = [_header(p.bucket, plans[p.bucket.destination_rank]) for p in placed]
        self._headers = torch.tensor(words, dtype=torch.int64, device=self._device).view(-1, 8)
        slots = max(len(self._tensors), 1)
        self._counters = torch.zeros(2, slots, dtype=torch.int64, device=self._device)
        self._zeros = torch.zeros(16, dtype=torch.uint8, device=self._device)
        self._pointers: dict[str, int] = {}
        self._prepare(share.source.storages())

    @classmethod
    def open(cls, choice: Choice, share: Share) -> GroupSender:
        """Join the communicator of an invitation."""
        device = next(iter(share.source.storages().values())).device
        group = NcclGroup.join(choice, device, share.timeout_s)
        return cls(share, group, dict(choice["members"]), choice["bucket_bytes"])

    def send(self, version: int, told: Told) -> Sent:  # noqa: ARG002  (headers have the digests)
        """Send the weights as they are now; never raises, so that the vote always takes place."""
        sent = Sent(self._rank)
        began = time.perf_counter()
        try:
            self._prepare(self._share.read())
        # Workers that wait for buckets get them all the same, marked void.
        except Exception as error:  # noqa: BLE001
            sent.error = named_error(error, self._rank)
        try:
            self._send_turns(version, sent)
            with waiting():
                bad = self._counters[1].nonzero().flatten().tolist()
            for slot in bad:
                count = int(self._counters[1, slot])
                sent.parts.append(PartReport(self._tensors[slot], count))
        except Exception as error:  # noqa: BLE001
            sent.error = sent.error or named_error(error, self._rank)
        sent.send_s = time.perf_counter() - began
        return sent

    def close(self) -> None:
        """Leave the group; a `send` under way ends with an error."""
        self._group.close()

    def _send_turns(self, version: int, sent: Sent) -> None:
        self._counters.zero_()
        self._headers[:, _FLAGS] &= ~ABORT
        self._headers[:, _VERSION] = version
        if sent.error is not None:
            self._headers[:, _FLAGS] |= ABORT
        tickets: list[tuple[Ticket, list[int]]] = []
        first = 0
        for number, turn in enumerate(self._turns):
            if number >= BUFFERS:
                self._group.fence(tickets[number - BUFFERS][0])
            if turn.table is not None and sent.error is None:
                run_table(turn.table, *self._counters)
            for row, (placed, message) in enumerate(
                zip(turn.buckets, turn.messages, strict=True), first
            ):
                self._headers[row, _DIGEST] = self._counters[0, placed.slots].sum()
                message[:HEADER_BYTES] = self._headers[row].view(torch.uint8)
                sent.bytes += message.numel()
            first += len(turn.buckets)
            peers = [self._members[placed.bucket.destination_rank] for placed in turn.buckets]
            ticket = self._group.exchange(list(zip(turn.messages, peers, strict=True)), [])
            tickets.append((ticket, peers))
            if number >= AHEAD:
                self._group.wait(*tickets[number - AHEAD], "take a bucket")
                self._share.progress(len(self._turns) - number)
        for ticket, peers in tickets[-AHEAD:]:
            self._group.wait(ticket, peers, "take a bucket")

    def _prepare(self, storages: Storages) -> None:
        """Build the tables, unless the weights still lie where they lay."""
        pointers = {name: t.data_ptr() for name, t in storages.items()}
        if pointers == self._pointers:
            return
        dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in storages.items()}
        amax = self._share.exchange.amax
        for turn in self._turns:
            turn.table = pack_table(
                turn.buckets, lambda name: (pointers[name], dtypes[name]), self._zeros, amax
            )
        self._pointers = pointers


def _header(bucket: Bucket, plan: bytes) -> list[int]:
    header = Header(bucket.index, 0, bucket.nbytes, 0, plan, len(bucket.parts)).pack()
    return list(struct.unpack("<8q", header))
