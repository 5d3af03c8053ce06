"""What workers of one node hand on to one another, turn by turn: packed from staging memory and into it.

While a turn is on the wire, the one before is unpacked. A turn's messages, sent and taken, lie in one of two
buffers, those in which the trainer's turns arrived.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8sync.engines.vllm.intake import Faults
from fp8sync.errors import CorruptBucket, PeerFailed
from fp8sync.plan.forward import forwarding_digest, handed_on, neighbours
from fp8sync.sending.turns import AHEAD, Stamp, Turn
from fp8sync.wire.header import ABORT, HEADER_BYTES, Header
from fp8sync.wire.tables import pack_table, unpack_table
from fp8sync_kernels import run_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8sync.engines.vllm.intake import Intake
    from fp8sync.plan import Bucket
    from fp8sync.transport.group import Group, Message, Ticket
    from fp8sync.wire.payload import Storages
    from fp8sync.wire.tables import PlacedBucket

__all__ = ["Relay", "check_headers"]


class Relay:
    """One worker's part in handing on.

    Args:
        intake: the plan, and where this worker is.
        group: the transport.
        members: number of every engine rank in the group.
        turns: messages of this worker with others.
    """

    def __init__(
        self, intake: Intake, group: Group, members: Mapping[int, int], turns: Sequence[Turn]
    ) -> None:
        self._channel, self._rank, self._device = intake.channel, intake.rank, intake.device
        self._group, self._members = group, members
        routes = neighbours(intake.plan, self._rank)
        self._plans = {r: forwarding_digest(handed_on(intake.plan, *r))[:16] for r in routes}
        self._away = [self._part(turn, away=True) for turn in turns]
        self._taken = [self._part(turn, away=False) for turn in turns]
        placed = [p for turn in turns for p in turn.buckets]
        sent = [p for turn in self._away for p in turn.buckets]
        self._stamp = Stamp(sent, self._plan_of, self._device)
        count = len(placed) - len(sent)
        self._headers = torch.zeros(count, HEADER_BYTES, dtype=torch.uint8).to(self._device)
        slots = max((p.slots.stop for p in placed), default=1)
        self._digests = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._zeros = torch.zeros(16, dtype=torch.uint8, device=self._device)
        self._pointers: dict[str, int] = {}

    def run(self, version: int, staged: Storages) -> None:
        """Hand on and take everything, then verify all headers and digests.

        Raises:
            CorruptBucket, PeerFailed, TransferTimeout, EngineLost: see `Receiver.forward`.
        """
        faults = Faults()
        try:
            self._prepare(staged)
        # Peers that wait for messages get them all the same, marked void.
        except Exception as error:  # noqa: BLE001
            faults.add(error)
        self._digests.zero_()
        self._stamp.begin(version, void=bool(faults))
        try:
            self._exchange(faults)
        except Exception as error:  # noqa: BLE001
            faults.add(error)
        faults.settle()
        placed = [p for turn in self._taken for p in turn.buckets]
        headers, digests = self._headers.cpu(), self._digests.cpu()
        where = f"engine rank {self._rank}"
        void = check_headers(headers, placed, digests, version, self._plan_of, where)
        if void is not None:
            raise PeerFailed(f"engine rank {void} stopped forwarding")

    def _exchange(self, faults: Faults) -> None:
        """Send and take every turn; after a fault void messages, and without a look at what arrives."""
        tickets: list[tuple[Ticket, list[int]]] = []
        row = 0
        for number, (away, taken) in enumerate(zip(self._away, self._taken, strict=True)):
            if away.table is not None and not faults:
                self._run(away, faults)
            tickets.append(self._begin(away, taken))
            if number:
                row = self._unpack(number - 1, row, tickets, faults)
            if number >= AHEAD:
                self._group.wait(*tickets[number - AHEAD], "forward a bucket")
                self._channel.progress(len(self._away) - number)
        if tickets:
            self._unpack(len(tickets) - 1, row, tickets, faults)
        for ticket, peers in tickets[-AHEAD:]:
            self._group.wait(ticket, peers, "forward a bucket")

    def _run(self, turn: Turn, faults: Faults) -> None:
        try:
            if turn.table is not None:
                run_table(turn.table, self._digests, None)
        # Whatever it is, peers wait for what is left.
        except Exception as error:  # noqa: BLE001
            faults.add(error)
            self._stamp.void()

    def _part(self, turn: Turn, *, away: bool) -> Turn:
        pairs = zip(turn.buckets, turn.messages, strict=True)
        own = [(p, m) for p, m in pairs if (p.bucket.source_rank == self._rank) is away]
        return Turn([p for p, _ in own], [m for _, m in own])

    def _plan_of(self, bucket: Bucket) -> bytes:
        return self._plans[bucket.source_rank, bucket.destination_rank]

    def _begin(self, away: Turn, taken: Turn) -> tuple[Ticket, list[int]]:
        sends: list[Message] = []
        for placed, message in zip(away.buckets, away.messages, strict=True):
            self._stamp.put(placed, message, self._digests)
            sends.append((message, self._members[placed.bucket.destination_rank]))
        receives: list[Message] = [
            (message, self._members[placed.bucket.source_rank])
            for placed, message in zip(taken.buckets, taken.messages, strict=True)
        ]
        peers = [peer for _, peer in (*sends, *receives)]
        return self._group.exchange(sends, receives), peers

    def _unpack(
        self, number: int, row: int, tickets: list[tuple[Ticket, list[int]]], faults: Faults
    ) -> int:
        """Unpack a turn that has arrived; returns the row of the next header."""
        self._group.fence(tickets[number][0])
        turn = self._taken[number]
        for message in turn.messages:
            self._headers[row].copy_(message[:HEADER_BYTES])
            row += 1
        if not faults:
            self._run(turn, faults)
        return row

    def _prepare(self, staged: Storages) -> None:
        """Build the tables, unless the staging memory still lies where it lay."""
        pointers = {name: t.data_ptr() for name, t in staged.items()}
        if pointers == self._pointers:
            return
        self._pointers = {}  # should it fail half-way
        dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in staged.items()}
        for turn in self._away:
            turn.table = pack_table(
                turn.buckets, lambda name: (pointers[name], dtypes[name]), self._zeros, {}
            )
        for turn in self._taken:
            turn.table = unpack_table(turn.buckets, pointers.__getitem__, self._device)
        self._pointers = pointers


def check_headers(
    headers: torch.Tensor,
    placed: Sequence[PlacedBucket],
    digests: torch.Tensor,
    version: int,
    plan: Callable[[Bucket], bytes],
    where: str,
) -> int | None:
    """Compare headers with what the plan says and with the digests of what arrived.

    Args:
        headers: uint8 [messages, 64], on the host.
        placed: the messages' buckets, in the same order.
        digests: int64 [slots], of their parts.
        version: of the weights.
        plan: the first 16 bytes of the digest that a bucket's header should have.
        where: who compares.

    Returns:
        The source rank of a message that is void, if there is one; then nothing is compared.

    Raises:
        CorruptBucket: naming every message and every field that differs.
    """
    found = [Header.unpack(bytes(row.tolist())) for row in headers]
    void = [p.bucket.source_rank for p, h in zip(placed, found, strict=True) if h.flags & ABORT]
    if void:
        return void[0]
    faults: list[str] = []
    for header, place in zip(found, placed, strict=True):
        bucket = place.bucket
        value = int(digests[place.slots].sum()) % (1 << 64)
        expected = Header(
            bucket.index, version, bucket.nbytes, value, plan(bucket), len(bucket.parts)
        )
        try:
            header.check(expected, f"{where}, bucket {bucket.index}")
        except CorruptBucket as error:
            faults += error.violations
    if faults:
        raise CorruptBucket("a bucket is not the one that the plan expects", faults)
    return None
