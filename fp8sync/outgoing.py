"""Which way out: staging memory on this host is written directly, anything else goes in buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from fp8sync.sender import Sender, Sent
from fp8sync.tables import unwritable
from fp8sync.transport.gloo import GlooGroup
from fp8sync.transport.memory import ExportedMemory, host_id
from fp8sync.writer import StagingPlace, Writer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8sync.plan import Plan
    from fp8sync.sources import Source

__all__ = ["Outgoing", "TransportChoice", "choose_transport", "open_sender"]

TransportChoice = dict[str, Any]
"""The control message `transport`: `kind` is `ipc` or `gloo`, with what a member needs to join."""


class Outgoing(Protocol):
    """One trainer rank's way out."""

    def send(self, version: int) -> Sent:
        """Send this rank's share; never raises."""


def choose_transport(
    wanted: str,
    plan: Plan,
    source_device: str,
    places: Mapping[int, Mapping[str, Any]],
    trainer_hosts: Sequence[str],
) -> tuple[str, str]:
    """Return (kind, why) for `transport="auto"`, `"ipc"` or `"gloo"`.

    Args:
        wanted: what the user asked for.
        plan: the agreed plan.
        source_device: `cuda` or `cpu`, where the trainer's weights are.
        places: by engine rank, what the worker said of its staging memory.
        trainer_hosts: `host_id` of every trainer rank.

    Raises:
        ValueError: unknown transport, or `ipc` where it is not possible; says why.
    """
    if wanted not in {"auto", "ipc", "gloo"}:
        raise ValueError(f"unknown transport {wanted!r}; known: auto, ipc, gloo")
    if wanted == "gloo":
        return "gloo", "asked for"
    why_not = ""
    if source_device != "cuda":
        why_not = "the trainer's weights are not on a GPU"
    elif any(place["memory"] is None for place in places.values()):
        why_not = "the engine's staging memory is not on a GPU"
    elif {p["memory"]["host"] for p in places.values()} | set(trainer_hosts) != {host_id()}:
        why_not = "trainer and engine are on different hosts"
    else:
        why_not = unwritable(plan.copies)
    if not why_not:
        return "ipc", "trainer and engine share a host"
    if wanted == "ipc":
        raise ValueError(f"transport 'ipc' is not possible: {why_not}")
    return "gloo", why_not


def open_sender(
    choice: TransportChoice,
    source: Source,
    rank: int,
    plan: Plan,
    bucket_bytes: int,
    timeout_s: float,
) -> Outgoing:
    """Return the sender of a trainer rank other than 0, from the message it got."""
    if choice["kind"] == "ipc":
        return open_writer(source, rank, plan, {int(r): p for r, p in choice["places"]})
    group = GlooGroup.join(
        choice["host"], choice["port"], choice["rank"], choice["size"], timeout_s
    )
    members = {int(engine_rank): int(number) for engine_rank, number in choice["members"]}
    return Sender(source, rank, plan, group, members, bucket_bytes)


def open_writer(
    source: Source, rank: int, plan: Plan, places: Mapping[int, Mapping[str, Any]]
) -> Writer:
    """Map every worker's staging memory."""
    mapped = {
        r: StagingPlace(ExportedMemory(**place["memory"]), place["offsets"])
        for r, place in places.items()
    }
    return Writer(source, rank, plan, mapped)
