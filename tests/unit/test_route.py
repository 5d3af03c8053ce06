"""Who is asked first, against the rule written down plainly: both ends of a link have to find the same."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fp8sync.plan.boxes import volume
from fp8sync.plan.route import first_senders
from fp8sync.plan.spread import Spread


def plainly(spreads: dict[str, Spread]) -> dict[str, tuple[int, ...]]:
    """Largest first, by name; each to the least loaded of the next eight holders, from whose turn it is."""
    places = [(name, i) for name, spread in spreads.items() for i in range(len(spread.rects))]
    size = {(name, i): volume(spreads[name].rects[i]) for name, i in places}
    holders = {(name, i): spreads[name].ranks[i] for name, i in places}
    shared = sorted((p for p in places if len(holders[p]) > 1), key=lambda p: (-size[p], *p))
    load: Counter[int] = Counter()
    for place in places:
        if len(holders[place]) == 1:
            load[holders[place][0]] += size[place]
    everyone = {rank for ranks in holders.values() for rank in ranks}
    enough = 0.01 * sum(size.values()) / max(1, len(everyone))
    turn: Counter[tuple[int, ...]] = Counter()
    found = dict.fromkeys(places, 0)
    for number, place in enumerate(shared):
        ranks = holders[place]
        if sum(size[p] for p in shared[number:]) < enough:
            break
        nearest = [(turn[ranks] + k) % len(ranks) for k in range(min(8, len(ranks)))]
        best = found[place] = min(nearest, key=lambda i: load[ranks[i]])
        turn[ranks] = best + 1
        load[ranks[best]] += size[place]
    return {n: tuple(found[n, i] for i in range(len(s.rects))) for n, s in spreads.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 9, 24])
def test_as_the_rule_says(ranks: int) -> None:
    chance = random.Random(ranks)

    def spread() -> Spread:
        sizes = [chance.choice([1, 3, 128, 256]) for _ in range(chance.randint(1, 5))]
        held = [tuple(chance.sample(range(ranks), chance.randint(1, ranks))) for _ in sizes]
        return Spread(tuple(((0, 256 * i), (1, n)) for i, n in enumerate(sizes)), tuple(held))

    for _ in range(50):
        spreads = [spread() for _ in range(chance.randint(1, 4))]
        model = {f"{chance.random()}": chance.choice(spreads) for _ in range(30)}
        assert first_senders(model) == plainly(model)
