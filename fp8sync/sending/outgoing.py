"""Which way out: staging memory on this host is written directly, anything else goes in buckets."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from fp8sync.sending.golden import GoldenSender
from fp8sync.sending.grouped import GroupSender
from fp8sync.sending.sender import Sender
from fp8sync.sending.writer import Writer
from fp8sync.transport.memory import host_id
from fp8sync.wire.tables import unwritable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8sync.plan import Plan
    from fp8sync.sending.share import Outgoing, Share
    from fp8sync.transport import Choice
    from fp8sync.transport.seat import Seat

__all__ = [
    "check_transport",
    "choose_transport",
    "forward_bytes",
    "not_linked",
    "open_senders",
]


def check_transport(wanted: str) -> None:
    """Raise ValueError for an unknown name."""
    if wanted not in {"auto", *_WAYS}:
        raise ValueError(f"unknown transport {wanted!r}; known: auto, {', '.join(_WAYS)}")


def choose_transport(
    wanted: str, plan: Plan, seats: Sequence[Seat], places: Mapping[int, Mapping[str, Any]]
) -> tuple[str, str]:
    """Return (kind, why) for what the user asked for: a transport by name, or `auto`.

    `auto` takes the first that is possible of `ipc`, `nccl` and `gloo`.

    Args:
        wanted: `auto`, or a name.
        plan: the agreed plan.
        seats: of every trainer rank.
        places: by engine rank, what the worker said of its staging memory.

    Raises:
        ValueError: unknown transport, or one that is not possible here; says why.
    """
    check_transport(wanted)
    if wanted in {"gloo", "golden"}:
        return wanted, "asked for"
    why_not = {
        "ipc": _not_mapped(plan, seats, places),
        "nccl": not_linked(seats, places) or unwritable(plan.copies, in_buckets=True),
    }
    if wanted in why_not:
        if why_not[wanted]:
            raise ValueError(f"transport {wanted!r} is not possible: {why_not[wanted]}")
        return wanted, "asked for"
    if not why_not["ipc"]:
        return "ipc", "trainer and engine share a host"
    if not why_not["nccl"]:
        return "nccl", f"{why_not['ipc']}; every rank has a GPU of its own"
    return "gloo", "; ".join(dict.fromkeys(why_not.values()))


def _not_mapped(plan: Plan, seats: Sequence[Seat], places: Mapping[int, Mapping[str, Any]]) -> str:
    if not all(seat.gpu for seat in seats):
        return "the trainer's weights are not on a GPU"
    if any(place["memory"] is None for place in places.values()):
        return "the engine's staging memory is not on a GPU"
    if {p["memory"]["host"] for p in places.values()} | {s.host for s in seats} != {host_id()}:
        return "trainer and engine are on different hosts"
    return unwritable(plan.copies)


def not_linked(seats: Sequence[Seat], places: Mapping[int, Mapping[str, Any]]) -> str:
    """Return why these members cannot have an NCCL communicator, or an empty string."""
    if not all(seat.gpu for seat in seats):
        return "the trainer's weights are not on a GPU"
    if not all(place["gpu"] for place in places.values()):
        return "the engine's weights are not on a GPU"
    count = Counter([*(seat.gpu for seat in seats), *(place["gpu"] for place in places.values())])
    shared = [gpu for gpu, ranks in count.items() if ranks > 1]
    if shared:
        return f"NCCL takes one rank per GPU, and {count[shared[0]]} share {shared[0]}"
    return ""


def forward_bytes(kind: str, plan: Plan, bucket_bytes: int) -> int:
    """Return the payload of a message between workers; by `nccl`, those of a turn share a bucket's bytes."""
    if kind != "nccl":
        return bucket_bytes
    routes = {(c.via, c.destination_rank) for c in plan.copies if c.via is not None}
    peers = Counter(rank for route in routes for rank in route)
    return bucket_bytes // max(peers.values(), default=1)


_WAYS: dict[str, Callable[[Choice, Sequence[Share]], Sequence[Outgoing]]] = {
    "ipc": Writer.open,
    "nccl": GroupSender.open,
    "gloo": Sender.open,
    "golden": GoldenSender.open,
}


def open_senders(choice: Choice, shares: Sequence[Share]) -> Sequence[Outgoing]:
    """Return a trainer rank's way out for each portion of a version, from the invitation it got."""
    return _WAYS[choice["kind"]](choice, shares)
