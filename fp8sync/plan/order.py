"""In which order members of a group exchange messages, each with one peer at a time."""

from __future__ import annotations

from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from fp8sync.plan.bucket import fill_buckets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8sync.plan.build import Plan

__all__ = ["RUN", "Run", "Stamps", "in_order", "messages_of", "order_of", "stamps_of"]

RUN = 8
"""Messages that two members exchange before they turn to others. At each change a member waits for a peer that
waits for another: dear at every message, and with longer runs a rank may wait long for its first."""

Run = tuple[int, int, int]
"""Source rank, destination rank, and how many of the messages between them come next."""


Stamps = tuple[int, str, int]
"""Engine rank, the first 16 bytes of the plan's digest to it in hex, and the number of the first bucket to it."""


def in_order(sizes: Mapping[tuple[int, int], Sequence[int]]) -> list[Run]:
    """Return an order by which every member takes its own messages.

    As it is the same for all members, nobody waits in a circle. It is the order in which runs would begin if
    each message took as long as it is large: the source that is free first turns to the destination that is
    free first and has the most to come; to its last one only where it would idle otherwise, so that nobody
    waits for all that a slow one has to send. All end about as soon as the busiest member can, whatever the
    routes; stages of a pipeline that feed the same workers take turns at them.

    Args:
        sizes: bytes of the messages from each source rank to each destination rank.
    """
    to_come: Counter[int] = Counter()
    routes: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for (source, destination), listed in sorted(sizes.items()):
        to_come[destination] += sum(listed)
        routes[source][destination] = [*reversed(listed)]
    # The earliest first; of several, the one with the most to send.
    sources = [(0, -sum(map(sum, own.values())), source) for source, own in routes.items()]
    heapify(sources)
    free: Counter[int] = Counter()
    last: dict[int, int] = {}
    order: list[Run] = []
    while sources:
        now, unsent, source = heappop(sources)
        own = routes[source]
        begin = {peer: max(free[peer], now) for peer in own}
        if (before := last.get(source)) in own:
            begin[before] += own[before][-1] // 8
        peer = min(own, key=lambda peer: (begin[peer], -to_come[peer], -sum(own[peer]), peer))
        last[source] = peer
        messages = [own[peer].pop() for _ in range(min(RUN, len(own[peer])))]
        order.append((source, peer, len(messages)))
        to_come[peer] -= sum(messages)
        free[peer] = max(free[peer], now) + sum(messages)
        if not own[peer]:
            del own[peer]
        if own:
            heappush(sources, (free[peer], unsent + sum(messages), source))
    return order


def order_of(plan: Plan, ranks: Iterable[int], bucket_bytes: int) -> list[Run]:
    """Return the order of the buckets that the trainer sends to these engine ranks."""
    return in_order(messages_of(plan, ranks, bucket_bytes))


def messages_of(
    plan: Plan, ranks: Iterable[int], bucket_bytes: int
) -> dict[tuple[int, int], list[int]]:
    """Return the payloads of all that the trainer sends to these engine ranks, by (source, destination)."""
    sizes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in ranks:
        for bucket in fill_buckets(plan.fed(rank), bucket_bytes):
            sizes[bucket.source_rank, rank].append(bucket.nbytes)
    return dict(sizes)


def stamps_of(
    plan: Plan, messages: Mapping[tuple[int, int], Sequence[int]]
) -> dict[int, list[Stamps]]:
    """Return what headers say that a trainer rank cannot know by its own copies, for each of them.

    Args:
        plan: of all ranks.
        messages: `messages_of`, of the same plan.
    """
    found: dict[int, list[Stamps]] = defaultdict(list)
    first: Counter[int] = Counter()
    for (source, rank), sizes in messages.items():
        found[source].append((rank, plan.digest(rank)[:32], first[rank]))
        first[rank] += len(sizes)
    return dict(found)
