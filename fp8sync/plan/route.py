"""Who sends what: the parts that fill a wanted rectangle, and turns among a part's holders.

Turns follow from the source's side and the destination's rank number alone. So every rank, trainer
or engine, finds the same senders, whether it plans for all destinations or only for itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8sync.plan.boxes import Rect, misaligned_dim, overlap, subtract, volume

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8sync.plan.spread import Spread

__all__ = ["Filling", "PartOf", "Router", "first_senders", "sender"]

_LOOKAHEAD = 8
"""How many replicas, from the next one on, are compared for the least load."""

_LEFT = 0.01
"""The smallest rectangles, together less than this part of a rank's average load, take no turns: fewer links."""


@dataclass(frozen=True, slots=True)
class PartOf:
    """A part of a wanted rectangle.

    Args:
        rect: the part, in elements of the HF tensor.
        owners: (index of the source rectangle, index among its holders) of all who have the part.
    """

    rect: Rect
    owners: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Filling:
    """What fills a wanted rectangle.

    Args:
        parts: disjoint.
        whole: whether nothing is missing.
        cut: whether the rectangle or a part of it begins or ends inside a 128-block.
    """

    parts: tuple[PartOf, ...]
    whole: bool
    cut: bool


class Router:
    """Finds the parts that fill wanted rectangles; remembers them by geometry."""

    def __init__(self) -> None:
        self._known: dict[tuple[Spread, Rect, tuple[int, ...]], Filling] = {}

    def fill(self, spread: Spread, wanted: Rect, shape: tuple[int, ...]) -> Filling:
        """Return what of `spread` fills the rectangle `wanted` of a tensor of `shape`."""
        key = spread, wanted, shape
        found = self._known.get(key)
        if found is None:
            parts = _parts(spread, wanted)
            whole = sum(volume(p.rect) for p in parts) == volume(wanted)
            rects = [wanted, *(p.rect for p in parts)]
            cut = any(misaligned_dim(r, shape) is not None for r in rects)
            found = self._known[key] = Filling(parts, whole, cut)
        return found


def _parts(spread: Spread, wanted: Rect) -> tuple[PartOf, ...]:
    owners: dict[Rect, list[tuple[int, int]]] = defaultdict(list)
    for i in spread.near(wanted):
        common = overlap(wanted, spread.rects[i])
        if common is not None:
            owners[common] += [(i, j) for j in range(len(spread.ranks[i]))]
    parts = [PartOf(rect, tuple(whose)) for rect, whose in owners.items()]
    if spread.tiled or len(parts) < 2:
        return tuple(parts)
    return _disjoint(parts, wanted)


def _disjoint(parts: list[PartOf], wanted: Rect) -> tuple[PartOf, ...]:
    """Replicas cut differently: the largest parts first, each for what is still open."""
    chosen: list[PartOf] = []
    open_: list[Rect] = [wanted]
    for part in sorted(parts, key=lambda p: (-volume(p.rect), p.rect)):
        still: list[Rect] = []
        for rect in open_:
            common = overlap(part.rect, rect)
            if common is None:
                still.append(rect)
                continue
            chosen.append(PartOf(common, part.owners))
            still += subtract(rect, common)
        open_ = still
    return tuple(sorted(chosen, key=lambda p: p.rect))


def sender(
    owners: tuple[tuple[int, int], ...], first: tuple[int, ...], rank: int
) -> tuple[int, int]:
    """Return which owner of a part sends it to destination `rank`; `first` as `first_senders` has it."""
    if len(owners) == 1:
        return owners[0]
    return owners[(first[owners[0][0]] + turn(rank, len(owners))) % len(owners)]


def turn(rank: int, replicas: int) -> int:
    """Return whose turn it is for a destination rank: the sum of its digits in base `replicas`.

    Ranks that want the same part often differ by a power of two; their last digit would be the same.
    """
    total = 0
    while rank:
        rank, digit = divmod(rank, replicas)
        total += digit
    return total % replicas


def first_senders(spreads: Mapping[str, Spread]) -> dict[str, tuple[int, ...]]:
    """Return, for each tensor and rectangle, the holder that destination rank 0 would ask.

    Large rectangles come first, each to the holder with the least to send so far, so that replicas
    share the bytes even where there is only one destination.
    """
    count = Counter(spreads.values())
    load: Counter[int] = Counter()
    shared: list[tuple[int, str, int]] = []
    for spread, tensors in count.items():
        for rect, ranks in zip(spread.rects, spread.ranks, strict=True):
            if len(ranks) == 1:
                load[ranks[0]] += tensors * volume(rect)
    first: dict[str, tuple[int, ...]] = {}
    chosen: dict[str, list[int]] = {}
    alone = {s: (0,) * len(s.rects) for s in count if all(len(r) == 1 for r in s.ranks)}
    for name, spread in spreads.items():
        if spread in alone:
            first[name] = alone[spread]
            continue
        chosen[name] = [0] * len(spread.rects)
        for i, ranks in enumerate(spread.ranks):
            if len(ranks) > 1:
                shared.append((volume(spread.rects[i]), name, i))
    everyone = {r for s in count for ranks in s.ranks for r in ranks}
    left = sum(size for size, _, _ in shared)
    enough = _LEFT * (sum(load.values()) + left) / max(1, len(everyone))
    next_: Counter[tuple[int, ...]] = Counter()
    for size, name, i in sorted(shared, key=lambda item: (-item[0], item[1], item[2])):
        if left < enough:
            break
        left -= size
        ranks = spreads[name].ranks[i]
        begin = next_[ranks]
        turns = [(begin + k) % len(ranks) for k in range(min(len(ranks), _LOOKAHEAD))]
        best = min(turns, key=lambda j: load[ranks[j]])
        chosen[name][i] = best
        next_[ranks] = best + 1
        load[ranks[best]] += size
    kept: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name, turns in chosen.items():
        key = tuple(turns)
        first[name] = kept.setdefault(key, key)
    return first
