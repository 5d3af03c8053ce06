"""One trainer rank's share of a refit, turn by turn: a bucket to one engine worker, then to the next.

While one turn is on the wire, one launch quantizes the next into the other buffer. Per turn and per bucket
the host makes a few calls, and looks where each storage lies.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch

from fp8sync.sending.live import LiveTable
from fp8sync.sending.share import Sent, Told, named_error, own_buckets
from fp8sync.sending.turns import AHEAD, BUFFERS, Stamp, in_runs, lay_out, make_buffers
from fp8sync.transport.memory import reader_of
from fp8sync.transport.nccl import NcclGroup
from fp8sync.waiting import waiting
from fp8sync.wire.payload import PartReport
from fp8sync.wire.tables import pack_table
from fp8sync_kernels import compile_ahead, run_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8sync.plan import Run
    from fp8sync.sending.share import Share
    from fp8sync.sending.turns import Turn
    from fp8sync.transport import Choice
    from fp8sync.transport.group import Group, Ticket
    from fp8sync.wire.payload import Storages
    from fp8sync_kernels import Table

__all__ = ["GroupSender"]


class GroupSender:
    """Sends one source rank's buckets to all engine workers.

    Args:
        share: what to send; the weights are all on one device.
        group: the transport.
        members: number of every engine rank in the group.
        order: of all members' messages (`plan.order_of`).
        bucket_bytes: payload of a message.
        buffers: for messages (`make_buffers`), if other portions of a version use them, too.
    """

    def __init__(
        self,
        share: Share,
        group: Group,
        members: Mapping[int, int],
        order: Sequence[Run],
        bucket_bytes: int,
        buffers: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._share, self._rank = share, share.rank
        self._group, self._members = group, members
        self._device = reader_of(share.source.storages())
        turns = in_runs(own_buckets(share, members, bucket_bytes), order)
        self._turns = lay_out(turns, buffers or make_buffers(turns, self._device))
        placed = [p for turn in self._turns for p in turn.buckets]
        self._tensors = [part.copy.tensor for p in placed for part in p.bucket.parts]
        plans = {r: share.plan_id(r) for r in {p.bucket.destination_rank for p in placed}}
        self._stamp = Stamp(placed, lambda b: plans[b.destination_rank], self._device)
        slots = max(len(self._tensors), 1)
        self._counters = torch.zeros(2, slots, dtype=torch.int64, device=self._device)
        self._zeros = torch.zeros(16, dtype=torch.uint8, device=self._device)
        self._tables = [
            LiveTable(
                (part.copy for placed in turn.buckets for part in placed.bucket.parts),
                partial(self._table, turn),
                self._device,
                share.exchange.alike,
            )
            for turn in self._turns
        ]
        storages = share.source.storages()
        for table in self._tables:
            compile_ahead(table.at(storages))

    @classmethod
    def open(cls, choice: Choice, shares: Sequence[Share]) -> list[GroupSender]:
        """Join the communicator of an invitation, and open a way for each portion of a version."""
        device = reader_of(shares[0].source.storages())
        members, size = dict(choice["members"]), choice["bucket_bytes"]
        with ExitStack() as joined:
            group = NcclGroup.join(choice, device, shares[0].timeout_s)
            joined.callback(group.close)
            buckets = [[b] for share in shares for b in own_buckets(share, members, size)]
            buffers = make_buffers(buckets, device)
            both = zip(shares, choice["orders"], strict=True)
            found = [cls(share, group, members, order, size, buffers) for share, order in both]
            joined.pop_all()
        return found

    def send(self, version: int, told: Told) -> Sent:  # noqa: ARG002  (headers have the digests)
        """Send the weights as they are now; never raises, so that the vote always takes place."""
        sent = Sent(self._rank)
        began = time.perf_counter()
        storages: Storages = {}
        try:
            storages = self._share.read()
        # Workers that wait for buckets get them all the same, marked void.
        except Exception as error:  # noqa: BLE001
            sent.error = named_error(error, self._rank)
        try:
            self._send_turns(version, storages, sent)
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

    def _send_turns(self, version: int, storages: Storages, sent: Sent) -> None:
        self._counters.zero_()
        self._stamp.begin(version, void=sent.error is not None)
        tickets: list[tuple[Ticket, list[int]]] = []
        for number, turn in enumerate(self._turns):
            if number >= BUFFERS:
                self._group.fence(tickets[number - BUFFERS][0])
            if sent.error is None:
                try:
                    run_table(self._tables[number].at(storages), *self._counters)
                # The rest goes all the same, marked void.
                except Exception as error:  # noqa: BLE001
                    sent.error = named_error(error, self._rank)
                    self._stamp.void()
            for placed, message in zip(turn.buckets, turn.messages, strict=True):
                self._stamp.put(placed, message, self._counters[0])
                sent.bytes += message.numel()
            peers = [self._members[placed.bucket.destination_rank] for placed in turn.buckets]
            ticket = self._group.exchange(list(zip(turn.messages, peers, strict=True)), [])
            tickets.append((ticket, peers))
            if number >= AHEAD:
                self._group.wait(*tickets[number - AHEAD], "take a bucket")
                self._share.progress(len(self._turns) - number)
        for ticket, peers in tickets[-AHEAD:]:
            self._group.wait(ticket, peers, "take a bucket")

    def _table(self, turn: Turn, source: Callable[[str], tuple[int, str]]) -> Table:
        return pack_table(turn.buckets, source, self._zeros, self._share.exchange.amax)
