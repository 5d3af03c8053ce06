"""Buckets that arrive turn by turn, from one trainer rank after the other, on the engine's GPU.

In a thread and on a stream of its own. While one turn arrives, one launch unpacks the last into staging
memory and digests it. Headers and digests are compared at the end: staged bytes are not live ones. Where
the engine keeps no FP8, codes are digested by the launch, and decoded tensor by tensor.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fp8sync.engines.vllm.intake import Faults
from fp8sync.engines.vllm.relay import Relay, check_headers
from fp8sync.errors import PeerFailed
from fp8sync.plan import Bucket, fill_buckets, in_turns
from fp8sync.plan.forward import handed_on, neighbours
from fp8sync.sending.turns import AHEAD, in_runs, lay_out, make_buffers
from fp8sync.transport.nccl import NcclGroup
from fp8sync.wire.header import HEADER_BYTES
from fp8sync.wire.payload import unpack
from fp8sync.wire.tables import decoded, unpack_table
from fp8sync_kernels import run_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from fp8sync.engines.vllm.intake import Intake
    from fp8sync.plan import Run
    from fp8sync.sending.turns import Turn
    from fp8sync.transport import Choice
    from fp8sync.transport.group import Group, Ticket
    from fp8sync.wire.payload import Storages

__all__ = ["GroupReceiver"]


class GroupReceiver:
    """One worker's way in.

    Args:
        intake: what to receive.
        group: the transport; trainer ranks have their own ranks as numbers.
        members: number of every engine rank in the group.
        order: of all members' messages (`plan.order_of`).
        bucket_bytes: payload of a message.
        forward_bytes: payload of a message between workers.
        buffers: for messages (`make_buffers`), if other portions of a version use them, too.
    """

    def __init__(
        self,
        intake: Intake,
        group: Group,
        members: Mapping[int, int],
        order: Sequence[Run],
        bucket_bytes: int,
        forward_bytes: int,
        buffers: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._rank, self._device, self._group = intake.rank, intake.device, group
        plan = intake.plan
        fed = in_runs(fill_buckets(plan.fed(intake.rank), bucket_bytes), order)
        forwarded = _forwarded(intake, forward_bytes)
        both = [*fed, *forwarded]
        turns = lay_out(both, buffers or make_buffers(both, self._device))
        self._turns = turns[: len(fed)]
        self._decoded = [_decoded(turn) for turn in self._turns]
        self._relay = Relay(intake, group, members, turns[len(fed) :])
        self._plan = bytes.fromhex(plan.digest(self._rank))[:16]
        count = sum(len(turn.buckets) for turn in self._turns)
        self._headers = torch.zeros(count, HEADER_BYTES, dtype=torch.uint8).to(self._device)
        slots = max((p.slots.stop for turn in self._turns for p in turn.buckets), default=1)
        self._digests = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._pointers: dict[str, int] = {}

    @classmethod
    def open(cls, choice: Choice, intakes: Sequence[Intake]) -> list[GroupReceiver]:
        """Join the communicator of an invitation, and open a way for each portion of a version."""
        first = intakes[0]
        members, sizes = dict(choice["members"]), (choice["bucket_bytes"], choice["forward_bytes"])
        with ExitStack() as joined:
            group = NcclGroup.join(choice, first.device, first.channel.timeout_s)
            joined.callback(group.close)
            turns = [turn for i in intakes for turn in _forwarded(i, sizes[1])]
            turns += [[b] for i in intakes for b in fill_buckets(i.plan.fed(i.rank), sizes[0])]
            buffers = make_buffers(turns, first.device)
            both = zip(intakes, choice["orders"], strict=True)
            found = [cls(intake, group, members, order, *sizes, buffers) for intake, order in both]
            joined.pop_all()
        return found

    def receive(self, version: int, staged: Storages) -> None:
        """Take every turn off the wire and unpack it, then verify all headers and digests."""
        faults = Faults()
        try:
            self._prepare(staged)
        # The senders wait for every message to be taken.
        except Exception as error:  # noqa: BLE001
            faults.add(error)
        with self._stream():
            self._digests.zero_()
            try:
                self._take(staged, faults)
            except Exception as error:  # noqa: BLE001
                faults.add(error)
            faults.settle()
            headers, digests = self._headers.cpu(), self._digests.cpu()
        placed = [p for turn in self._turns for p in turn.buckets]
        where = f"engine rank {self._rank}"
        void = check_headers(headers, placed, digests, version, lambda _: self._plan, where)
        if void is not None:
            raise PeerFailed(f"trainer rank {void} stopped sending")

    def forward(self, version: int, staged: Storages) -> None:
        """Hand on and take, turn by turn."""
        with self._stream():
            self._relay.run(version, staged)

    def close(self) -> None:
        """Leave the group; a `receive` under way ends with an error."""
        self._group.close()

    def _take(self, staged: Storages, faults: Faults) -> None:
        """Take every turn; after a fault without a look at it."""
        tickets = [self._begin(turn) for turn in self._turns[:1]]
        row = 0
        for number, turn in enumerate(self._turns):
            # Begun before this turn is unpacked: all that it waits for is the turn before, unpacked.
            tickets += [self._begin(later) for later in self._turns[number + 1 : number + 2]]
            self._group.fence(tickets[number])
            if not faults:
                try:
                    self._unpack(number, row, staged)
                except Exception as error:  # noqa: BLE001
                    faults.add(error)
            row += len(turn.messages)
            if number >= AHEAD:
                self._wait(number - AHEAD, tickets)
        for number in range(max(len(tickets) - AHEAD, 0), len(tickets)):
            self._wait(number, tickets)

    def _unpack(self, number: int, row: int, staged: Storages) -> None:
        """Unpack a turn that has arrived; `row` is that of its first header."""
        turn = self._turns[number]
        for message in turn.messages:
            self._headers[row].copy_(message[:HEADER_BYTES])
            row += 1
        if turn.table is not None:
            run_table(turn.table, self._digests, None)
        for bucket, message in self._decoded[number]:
            unpack(bucket, message[HEADER_BYTES:], staged)

    def _begin(self, turn: Turn) -> Ticket:
        sources = [placed.bucket.source_rank for placed in turn.buckets]
        return self._group.exchange([], list(zip(turn.messages, sources, strict=True)))

    def _wait(self, number: int, tickets: list[Ticket]) -> None:
        sources = [placed.bucket.source_rank for placed in self._turns[number].buckets]
        self._group.wait(tickets[number], sources, "send a bucket")

    def _prepare(self, staged: Storages) -> None:
        """Build the tables, unless the staging memory still lies where it lay."""
        pointers = {name: t.data_ptr() for name, t in staged.items()}
        if pointers != self._pointers:
            self._pointers = {}  # should it fail half-way
            for turn in self._turns:
                turn.table = unpack_table(turn.buckets, pointers.__getitem__, self._device)
            self._pointers = pointers

    def _stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        torch.cuda.set_device(self._device)  # of this thread
        return torch.cuda.stream(torch.cuda.Stream(self._device))


def _decoded(turn: Turn) -> list[tuple[Bucket, torch.Tensor]]:
    """What no table unpacks: parts of buckets, and the buckets' messages."""
    found = []
    for placed, message in zip(turn.buckets, turn.messages, strict=True):
        parts = tuple(part for part in placed.bucket.parts if decoded(part.copy))
        if parts:
            found.append((replace(placed.bucket, parts=parts), message))
    return found


def _forwarded(intake: Intake, forward_bytes: int) -> list[list[Bucket]]:
    """Return the turns with other workers."""
    forwarded: list[Bucket] = []
    for route in neighbours(intake.plan, intake.rank):
        forwarded += fill_buckets(handed_on(intake.plan, *route), forward_bytes)
    return in_turns(forwarded)
