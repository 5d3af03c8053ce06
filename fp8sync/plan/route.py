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
    holders: dict[tuple[int, ...], _Holders] = {}
    shared: dict[Spread, list[tuple[int, int, _Holders]]] = {}
    for spread, tensors in count.items():
        shared[spread] = []
        for i, (rect, ranks) in enumerate(zip(spread.rects, spread.ranks, strict=True)):
            if len(ranks) == 1:
                load[ranks[0]] += tensors * volume(rect)
            elif ranks:
                load.update(dict.fromkeys(ranks, 0))
                whose = holders.setdefault(ranks, _Holders(ranks))
                shared[spread].append((volume(rect), i, whose))
    chosen = {name: [0] * len(s.rects) for name, s in spreads.items() if shared[s]}
    left = sum(tensors * size for s, tensors in count.items() for size, _, _ in shared[s])
    enough = _LEFT * (load.total() + left) / max(1, len(load))
    # By size, and then by name: most of a model's many rectangles are of few sizes.
    sized: dict[int, list[tuple[str, int, _Holders]]] = defaultdict(list)
    for name in sorted(chosen):
        for size, i, whose in shared[spreads[name]]:
            sized[size].append((name, i, whose))
    for size in sorted(sized, reverse=True):
        for name, i, whose in sized[size]:
            if left < enough:
                break
            left -= size
            chosen[name][i] = whose.least(load, size)
    kept: dict[tuple[int, ...], tuple[int, ...]] = {}
    first: dict[str, tuple[int, ...]] = {}
    for name, spread in spreads.items():
        turns = tuple(chosen.get(name) or (0,) * len(spread.rects))
        first[name] = kept.setdefault(turns, turns)
    return first


class _Holders:
    """Ranks that hold the same, and whose turn is next."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self._ring, self._count, self._next = ranks * 2, len(ranks), 0

    def least(self, load: dict[int, int], size: int) -> int:
        """Return who of the next ones has the least load, which grows by `size`."""
        ahead = self._ring[self._next : self._next + min(self._count, _LOOKAHEAD)]
        loads = list(map(load.__getitem__, ahead))
        place = loads.index(min(loads))
        load[ahead[place]] += size
        found = (self._next + place) % self._count
        self._next = (found + 1) % self._count
        return found
