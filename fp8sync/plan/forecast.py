"""How long a refit's wires will be busy, for a table of bandwidths, and whether forwarding pays."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from fp8sync.plan.traffic import Traffic

__all__ = ["Bandwidths", "Forecast", "Links", "Outlook", "forecast", "wire_time"]

Links = Mapping[tuple[int, int], int]
"""Bytes by (sending rank, receiving rank)."""

_WORTH = 0.9
"""Forwarding has to bring the wire time below this part of it: a second round of votes is not in the forecast."""


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

    def __post_init__(self) -> None:
        found = {
            name: getattr(self, name) for name in ("gpus_per_node", "node_gb_s", "network_gb_s")
        }
        faults = [f"{n}: expected more than 0, found {v}" for n, v in found.items() if not v > 0]
        if not self.message_us >= 0:
            faults.append(f"message_us: expected at least 0, found {self.message_us}")
        if faults:
            raise ValueError("; ".join(faults))


@dataclass(frozen=True)
class Forecast:
    """The busiest rank's wire time, by what keeps it busy.

    Args:
        seconds: wire time of the refit: the busiest rank's, and then the busiest forwarder's.
        rank: the busiest rank, as `trainer 3` or `engine 0`.
        node_bytes: bytes between GPUs of one node, all ranks, forwarded ones included.
        network_bytes: bytes between nodes, all ranks.
        forwarded_bytes: bytes from engine rank to engine rank.
    """

    seconds: float
    rank: str
    node_bytes: int
    network_bytes: int
    forwarded_bytes: int = 0


@dataclass(frozen=True)
class Outlook:
    """Both ways to feed workers that want the same bytes.

    Args:
        direct: trainers send to every worker.
        forwarded: trainers feed each node once, and workers hand on to one another; None where no two
            workers of a node want the same.
    """

    direct: Forecast
    forwarded: Forecast | None = None

    @property
    def pays(self) -> bool:
        """Whether feeding each node once takes clearly less wire time."""
        return self.forwarded is not None and self.forwarded.seconds < _WORTH * self.direct.seconds

    @property
    def chosen(self) -> Forecast:
        """The way that is taken."""
        return self.forwarded if self.forwarded is not None and self.pays else self.direct

    @property
    def reason(self) -> str:
        """What is forwarded, or why nothing is."""
        if self.forwarded is None:
            return "nothing is forwarded: no two engine ranks of a node want the same"
        times = (
            f"{self.forwarded.seconds:.3g} s of wire time instead of {self.direct.seconds:.3g} s"
        )
        if self.pays:
            nbytes = f"{self.forwarded.forwarded_bytes:,} bytes are forwarded"
            return f"{nbytes}, each node being fed once: {times}"
        least = f"it has to be below {_WORTH:.0%} of that"
        return f"nothing is forwarded: feeding each node once would take {times}; {least}"


def wire_time(
    links: Links,
    forwards: Links,
    node_of: Callable[[str, int], Hashable],
    bandwidths: Bandwidths,
    bucket_bytes: int,
) -> Forecast:
    """Return the wire time: the most time that any rank's links are busy, in or out.

    Workers forward once they have everything that trainer ranks send. Quantizing hides behind the wire
    and is not counted; nor is installing.

    Args:
        links: from trainer rank to engine rank.
        forwards: from engine rank to engine rank of its node.
        node_of: the node of a rank, given `trainer` or `engine` and its number.
        bandwidths: of the links.
        bucket_bytes: payload of a message.
    """
    near: Counter[tuple[str, int]] = Counter()
    far: Counter[tuple[str, int]] = Counter()
    messages: Counter[tuple[str, int]] = Counter()
    node_bytes = 0
    for (source, destination), nbytes in links.items():
        same = node_of("trainer", source) == node_of("engine", destination)
        node_bytes += nbytes * same
        for end in (("trainer", source), ("engine", destination)):
            (near if same else far)[end] += nbytes
            messages[end] += -(-nbytes // bucket_bytes)
    busy = {
        end: max(near[end] / bandwidths.node_gb_s, far[end] / bandwidths.network_gb_s) / 1e9
        + messages[end] * bandwidths.message_us / 1e6
        for end in messages
    }
    slowest = max(busy, key=lambda end: busy[end], default=("trainer", 0))
    passing: dict[tuple[str, int], float] = defaultdict(float)
    for (source, destination), nbytes in forwards.items():
        took = nbytes / bandwidths.node_gb_s / 1e9
        took += -(-nbytes // bucket_bytes) * bandwidths.message_us / 1e6
        passing["out", source] += took
        passing["in", destination] += took
    forwarded = sum(forwards.values())
    return Forecast(
        busy.get(slowest, 0.0) + max(passing.values(), default=0),
        f"{slowest[0]} {slowest[1]}",
        node_bytes + forwarded,
        sum(links.values()) - node_bytes,
        forwarded,
    )


def forecast(traffic: Traffic, bandwidths: Bandwidths) -> Outlook:
    """Return the wire time of both ways."""
    per_node = bandwidths.gpus_per_node
    last = max(traffic.held, default=0)
    first = {"trainer": 0, "engine": 0 if bandwidths.same_nodes else last // per_node + 1}

    def node_of(side: str, rank: int) -> int:
        return first[side] + rank // per_node

    about = node_of, bandwidths, traffic.bucket_bytes
    direct = wire_time(traffic.links, {}, *about)
    if not traffic.forwards:
        return Outlook(direct)
    return Outlook(direct, wire_time(traffic.fed, traffic.forwards, *about))
