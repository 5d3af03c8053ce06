"""The figures of a refit that is planned on paper: as text, and as JSON."""

from __future__ import annotations

from collections import Counter
from heapq import nsmallest
from typing import TYPE_CHECKING, Any

from fp8sync.plan.forecast import forecast

if TYPE_CHECKING:
    from fp8sync.plan.forecast import Bandwidths, Outlook
    from fp8sync.plan.traffic import Traffic

__all__ = ["figures", "report"]

_Link = tuple[int, str, int, int]
"""Bytes, negative, so that the busiest comes first; the sender's side and rank, and the receiver's rank."""


def report(traffic: Traffic, bandwidths: Bandwidths, top: int = 10) -> str:
    """Return totals, busiest links and ranks, memory, time and the misc list as text."""
    ahead = forecast(traffic, bandwidths)
    found = ahead.chosen
    moved, links = _moved(traffic, ahead)
    buffers = 2 * traffic.bucket_bytes
    peak = max(traffic.staged.values(), default=0) + buffers
    amax, received = traffic.amax, traffic.received()
    lines = [
        f"{len(traffic.tensors):,} tensors in {traffic.copies:,} copies, {traffic.total_bytes:,} bytes",
        f"{len(links):,} links, {_messages(traffic, links):,} messages of {traffic.bucket_bytes:,} bytes",
        _extremes("sent by a trainer rank", [moved[r] for r in traffic.held]),
        _extremes("received by an engine rank", [received[r] for r in traffic.staged]),
        *(f"link {name}: {nbytes:,} bytes" for name, nbytes in _busiest(links, top)),
        f"peak memory, trainer rank: {buffers:,} bytes (two buckets)",
        f"peak memory, engine rank: {peak:,} bytes (staging and two buckets)",
    ]
    if amax.groups:
        lines.append(
            f"partial amax: {amax.blocks:,} blocks of {amax.tensors:,} tensors in "
            f"{amax.groups:,} groups"
        )
    lines.append(
        f"wire time: {found.seconds:.3f} s, {found.rank} being the busiest; "
        f"{found.node_bytes:,} bytes within nodes at {bandwidths.node_gb_s:g} GB/s a GPU, "
        f"{found.network_bytes:,} between nodes at {bandwidths.network_gb_s:g} GB/s a GPU"
    )
    lines += [
        f"forwarding: {ahead.reason}",
        f"misc: {len(traffic.misc)} tensors",
        *(f"  {name}: {reason}" for name, reason in traffic.misc.items()),
    ]
    return "\n".join(lines)


def figures(traffic: Traffic, bandwidths: Bandwidths, top: int = 10) -> dict[str, Any]:
    """Return the same as JSON-able data."""
    ahead = forecast(traffic, bandwidths)
    moved, links = _moved(traffic, ahead)
    return {
        "tensors": len(traffic.tensors),
        "copies": traffic.copies,
        "bytes": traffic.total_bytes,
        "links": len(links),
        "messages": _messages(traffic, links),
        "top_links": [list(link) for link in _busiest(links, top)],
        "max_sent_bytes": max(moved.values(), default=0),
        "max_received_bytes": max(traffic.received().values(), default=0),
        "max_staged_bytes": max(traffic.staged.values(), default=0),
        "amax_groups": traffic.amax.groups,
        "wire_s": ahead.chosen.seconds,
        "direct_wire_s": ahead.direct.seconds,
        "forwarded_bytes": ahead.chosen.forwarded_bytes,
        "forwarding": ahead.reason,
        "misc": traffic.misc,
    }


def _moved(traffic: Traffic, ahead: Outlook) -> tuple[Counter[int], list[_Link]]:
    """Return what every trainer rank sends, and all links."""
    moved = traffic.fed if ahead.pays else traffic.links
    forwards = traffic.forwards if ahead.pays else {}
    sent: Counter[int] = Counter()
    for (source, _), nbytes in moved.items():
        sent[source] += nbytes
    links = [(-nbytes, "", *link) for link, nbytes in moved.items()]
    return sent, links + [(-nbytes, "engine ", *link) for link, nbytes in forwards.items()]


def _busiest(links: list[_Link], top: int) -> list[tuple[str, int]]:
    return [(f"{side}{a} -> {b}", -less) for less, side, a, b in nsmallest(top, links)]


def _messages(traffic: Traffic, links: list[_Link]) -> int:
    return sum(-(less // traffic.bucket_bytes) for less, _, _, _ in links)


def _extremes(what: str, values: list[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{what}: {low:,} to {high:,} bytes"
