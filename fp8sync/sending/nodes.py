"""Whether workers of a node hand on to one another what several of them want."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fp8sync.plan.forecast import Bandwidths, Outlook, wire_time
from fp8sync.plan.forward import shared, with_forwarding
from fp8sync.wire.tables import unwritable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8sync.plan import Plan
    from fp8sync.transport.seat import Seat

__all__ = ["Feeding", "choose_feeding"]


@dataclass(frozen=True)
class Feeding:
    """How workers are fed.

    Args:
        plan: with what is forwarded.
        reason: what is forwarded, or why nothing is.
        nodes: the node of every engine rank; empty where nothing is forwarded.
        sharers: see `plan.forward.shared`.
    """

    plan: Plan
    reason: str
    nodes: Mapping[int, str] = field(default_factory=dict)
    sharers: Mapping[int, Sequence[tuple[int, ...]]] = field(default_factory=dict)


def choose_feeding(
    transport: str,
    plan: Plan,
    trainers: Sequence[Seat],
    engines: Mapping[int, Seat],
    bucket_bytes: int,
) -> Feeding:
    """Let nodes be fed once where that is less wire time, by `Bandwidths`' defaults.

    Args:
        transport: as asked for.
        plan: of all ranks.
        trainers: seats, by rank.
        engines: seats, by engine rank.
        bucket_bytes: payload of a message.
    """
    seats = [*trainers, *engines.values()]
    mapped = len({seat.host for seat in seats}) == 1 and all(seat.gpu for seat in seats)
    mapped = mapped and not unwritable(plan.copies)
    if transport == "ipc" or (transport == "auto" and mapped):
        text = "nothing is forwarded: trainers write into the memory of every worker of this host"
        return Feeding(plan, text)
    if transport == "golden":
        return Feeding(plan, "nothing is forwarded: golden sends every tensor to every worker")
    nodes = {rank: seat.node for rank, seat in engines.items()}
    sharers = shared(plan, nodes)
    forwarding = with_forwarding(plan, sharers)
    outlook = _outlook(plan, forwarding, trainers, nodes, bucket_bytes)
    if not outlook.pays:
        return Feeding(plan, outlook.reason)
    return Feeding(forwarding, outlook.reason, nodes, sharers)


def _outlook(
    plan: Plan,
    forwarding: Plan,
    trainers: Sequence[Seat],
    nodes: Mapping[int, str],
    bucket_bytes: int,
) -> Outlook:
    def node_of(side: str, rank: int) -> str:
        return trainers[rank].node if side == "trainer" else nodes[rank]

    about = node_of, Bandwidths(), bucket_bytes
    direct = wire_time(_links(plan)[0], {}, *about)
    fed, forwards = _links(forwarding)
    return Outlook(direct, wire_time(fed, forwards, *about) if forwards else None)


def _links(plan: Plan) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
    """Bytes from trainer rank to engine rank, and from engine rank to engine rank."""
    fed: Counter[tuple[int, int]] = Counter()
    forwards: Counter[tuple[int, int]] = Counter()
    for copy in plan.copies:
        nbytes = copy.weight_bytes + copy.scale_bytes
        if copy.via is None:
            fed[copy.source_rank, copy.destination_rank] += nbytes
        else:
            forwards[copy.via, copy.destination_rank] += nbytes
    return fed, forwards
