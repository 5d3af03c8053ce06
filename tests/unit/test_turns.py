"""The turns that members of a group take: nobody has two peers at once, and nobody waits in a circle."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from fp8sync.plan import Bucket
from fp8sync.sending.turns import RUN, in_rounds

SHAPES = [(1, 1), (1, 4), (2, 2), (2, 4), (4, 2), (3, 5), (4, 4)]


def taken(trainers: int, workers: int, lengths: dict[tuple[int, int], int]) -> dict[str, list[str]]:
    """Whom every member is with, turn by turn."""

    def turns(buckets: list[Bucket]) -> list[Bucket]:
        found = in_rounds(buckets, range(trainers), range(workers))
        assert all(len(turn) == 1 for turn in found)
        return [bucket for (bucket,) in found]

    def route(t: int, w: int) -> list[Bucket]:
        return [Bucket(n, t, w, (), 16) for n in range(lengths[t, w])]

    members = {}
    for t in range(trainers):
        own = turns([b for w in range(workers) for b in route(t, w)])
        members[f"t{t}"] = [f"w{b.destination_rank}" for b in own]
    for w in range(workers):
        own = turns([b for t in range(trainers) for b in route(t, w)])
        members[f"w{w}"] = [f"t{b.source_rank}" for b in own]
    return members


@pytest.mark.parametrize(("trainers", "workers"), SHAPES)
@pytest.mark.parametrize("uneven", [False, True])
def test_members_meet_in_every_round(trainers: int, workers: int, uneven: bool) -> None:
    routes = product(range(trainers), range(workers))
    most = 2 * RUN + 3
    lengths = {r: (5 * r[0] + 3 * r[1]) % most if uneven else most for r in routes}
    left = taken(trainers, workers, lengths)
    rounds = 0
    while any(left.values()):
        heads = {member: queue[0] for member, queue in left.items() if queue}
        met = [m for m, peer in heads.items() if heads.get(peer) == m]
        assert met, f"all wait for one another: {heads}"
        for member in met:
            left[member].pop(0)
        rounds += 1
    if not uneven:
        assert rounds == most * max(trainers, workers)


def test_buckets_of_a_route_stay_in_order() -> None:
    buckets = [Bucket(n, 0, w, (), 16) for w in range(3) for n in range(2 * RUN)]
    seen: Counter[int] = Counter()
    for (bucket,) in in_rounds(buckets, range(2), range(3)):
        assert bucket.index == seen[bucket.destination_rank]
        seen[bucket.destination_rank] += 1
