"""Buckets that travel together: their places in two buffers, and their headers, written on the GPU.

Every member takes its turns in an order that all members keep (`plan.order`), so no two can wait for each other.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import PlanMismatch
from fp8sync.wire.header import ABORT, HEADER_BYTES, Header
from fp8sync.wire.tables import PlacedBucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fp8sync.plan import Bucket, Run
    from fp8sync_kernels import Table

__all__ = ["AHEAD", "BUFFERS", "Stamp", "Turn", "in_runs", "lay_out", "make_buffers"]

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


def in_runs(buckets: Iterable[Bucket], order: Iterable[Run]) -> list[list[Bucket]]:
    """Return a member's turns, a bucket in each: so a message is as large as the buffer, and no link is shared.

    Args:
        buckets: of a trainer rank, or of a worker.
        order: of all members' messages.

    Raises:
        PlanMismatch: a route has another number of messages in the order.
    """
    left: dict[tuple[int, int], list[Bucket]] = defaultdict(list)
    for bucket in buckets:
        left[bucket.source_rank, bucket.destination_rank].append(bucket)
    told: Counter[tuple[int, int]] = Counter()
    turns: list[list[Bucket]] = []
    for source, destination, count in order:
        route = source, destination
        if route in left:
            turns += [[bucket] for bucket in left[route][told[route] : told[route] + count]]
            told[route] += count
    faults = [
        f"trainer rank {route[0]} to engine rank {route[1]}: "
        f"expected {len(listed)} messages, found {told[route]}"
        for route, listed in left.items()
        if len(listed) != told[route]
    ]
    if faults:
        raise PlanMismatch("the order of messages is of another plan", faults)
    return turns


def make_buffers(turns: Sequence[Sequence[Bucket]], device: torch.device) -> list[torch.Tensor]:
    """Return the two buffers that turns alternate between, each as large as the largest turn."""
    room = max((sum(map(_room, turn)) for turn in turns), default=0)
    return [torch.empty(room, dtype=torch.uint8, device=device) for _ in turns[:BUFFERS]]


def lay_out(turns: Sequence[Sequence[Bucket]], buffers: Sequence[torch.Tensor]) -> list[Turn]:
    """Give every turn its place in one of two buffers."""
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


class Stamp:
    """Headers of messages that are sent, kept on the device; version, flags and digests change.

    Args:
        placed: the messages' buckets, in the order in which they are stamped.
        plan: the first 16 bytes of the digest that a bucket's header has.
        device: where the messages lie.
    """

    def __init__(
        self,
        placed: Sequence[PlacedBucket],
        plan: Callable[[Bucket], bytes],
        device: torch.device,
    ) -> None:
        words = [_words(p.bucket, plan(p.bucket)) for p in placed]
        self._rows = torch.tensor(words, dtype=torch.int64, device=device).view(-1, 8)
        self._next = 0

    def begin(self, version: int, *, void: bool) -> None:
        """Go back to the first message, for a new version."""
        self._rows[:, _FLAGS] &= ~ABORT
        self._rows[:, _VERSION] = version
        if void:
            self.void()
        self._next = 0

    def void(self) -> None:
        """Mark all messages that are still to be stamped."""
        self._rows[:, _FLAGS] |= ABORT

    def put(self, placed: PlacedBucket, message: torch.Tensor, digests: torch.Tensor) -> None:
        """Write the next header; the digests of the bucket's slots add up to its payload's."""
        row = self._rows[self._next]
        row[_DIGEST] = digests[placed.slots].sum()
        message[:HEADER_BYTES] = row.view(torch.uint8)
        self._next += 1


def _room(bucket: Bucket) -> int:
    return -(-(HEADER_BYTES + bucket.nbytes) // HEADER_BYTES) * HEADER_BYTES


def _words(bucket: Bucket, plan: bytes) -> list[int]:
    header = Header(bucket.index, 0, bucket.nbytes, 0, plan, len(bucket.parts)).pack()
    return list(struct.unpack("<8q", header))
