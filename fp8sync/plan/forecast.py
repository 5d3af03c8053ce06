"""How long a refit's wires will be busy, for a table of bandwidths; and the plan's figures as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8sync.plan.traffic import Traffic

__all__ = ["Bandwidths", "Forecast", "forecast", "report"]


@dataclass(frozen=True)
class Bandwidths:
    """What a GPU's links carry, one way, and where ranks sit.

    Args:
        gpus_per_node: ranks fill nodes in order.
        node_gb_s: between GPUs of a node, per GPU, in 10^9 bytes a second.
        network_gb_s: between nodes, per GPU.
        message_us: what a message costs its sender and its receiver besides its bytes.
        same_nodes: whether engine rank 0 sits on trainer rank 0's node; otherwise the engine begins
            on the first node that the trainer leaves free.
    """

    gpus_per_node: int = 8
    node_gb_s: float = 366.0
    network_gb_s: float = 50.0
    message_us: float = 20.0
    same_nodes: bool = False


@dataclass(frozen=True)
class Forecast:
    """The busiest rank's wire time, by what keeps it busy.

    Args:
        seconds: wire time of the refit: the busiest rank's.
        rank: that rank, as `trainer 3` or `engine 0`.
        node_bytes: bytes between GPUs of one node, all ranks.
        network_bytes: bytes between nodes, all ranks.
    """

    seconds: float
    rank: str
    node_bytes: int
    network_bytes: int


def forecast(traffic: Traffic, bandwidths: Bandwidths) -> Forecast:
    """Return the wire time: the most time that any rank's links are busy, in or out.

    Quantizing hides behind the wire and is not counted; nor is installing.
    """
    per_node = bandwidths.gpus_per_node
    last = max((source for source, _ in traffic.held.items()), default=0)
    first_node = 0 if bandwidths.same_nodes else last // per_node + 1
    near: Counter[tuple[str, int]] = Counter()
    far: Counter[tuple[str, int]] = Counter()
    messages: Counter[tuple[str, int]] = Counter()
    node_bytes = 0
    for (source, destination), nbytes in traffic.links.items():
        same = source // per_node == first_node + destination // per_node
        node_bytes += nbytes * same
        count = -(-nbytes // traffic.bucket_bytes)
        for end in (("trainer", source), ("engine", destination)):
            (near if same else far)[end] += nbytes
            messages[end] += count
    busy = {
        end: max(near[end] / bandwidths.node_gb_s, far[end] / bandwidths.network_gb_s) / 1e9
        + messages[end] * bandwidths.message_us / 1e6
        for end in messages
    }
    slowest = max(busy, key=lambda end: busy[end], default=("trainer", 0))
    network = traffic.total_bytes - node_bytes
    return Forecast(busy.get(slowest, 0.0), f"{slowest[0]} {slowest[1]}", node_bytes, network)


def report(traffic: Traffic, bandwidths: Bandwidths, top: int = 10) -> str:
    """Return the figures of a refit as text: totals, busiest links and ranks, memory, time, misc."""
    sent, received = traffic.sent(), traffic.received()
    found = forecast(traffic, bandwidths)
    buffers = 2 * traffic.bucket_bytes
    misc = traffic.misc
    peak = max(traffic.staged.values(), default=0) + buffers
    links = sorted(traffic.links.items(), key=lambda item: (-item[1], item[0]))
    lines = [
        f"{len(traffic.tensors):,} tensors in {traffic.copies:,} copies, {traffic.total_bytes:,} bytes",
        f"{len(traffic.links):,} links, {traffic.messages:,} messages of {traffic.bucket_bytes:,} bytes",
        _extremes("sent by a trainer rank", [sent[r] for r in traffic.held]),
        _extremes("received by an engine rank", [received[r] for r in traffic.staged]),
        *(f"link {a} -> {b}: {nbytes:,} bytes" for (a, b), nbytes in links[:top]),
        f"peak memory, trainer rank: {buffers:,} bytes (two buckets)",
        f"peak memory, engine rank: {peak:,} bytes (staging and two buckets)",
    ]
    if traffic.amax.groups:
        lines.append(
            f"partial amax: {traffic.amax.blocks:,} blocks of {traffic.amax.tensors:,} tensors in "
            f"{traffic.amax.groups:,} groups"
        )
    lines.append(
        f"wire time: {found.seconds:.3f} s, {found.rank} being the busiest; "
        f"{found.node_bytes:,} bytes within nodes at {bandwidths.node_gb_s:g} GB/s a GPU, "
        f"{found.network_bytes:,} between nodes at {bandwidths.network_gb_s:g} GB/s a GPU"
    )
    lines.append(f"misc: {len(misc)} tensors")
    lines += [f"  {name}: {reason}" for name, reason in misc.items()]
    return "\n".join(lines)


def _extremes(what: str, values: list[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{what}: {low:,} to {high:,} bytes"
