"""Where a side keeps each tensor: rectangles and their holders, without the storages.

Most tensors of a model lie alike: an expert's gate in layer 5 as the one in layer 6. Such tensors
share one `Spread`, so what follows from geometry alone is worked out once for all of them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from fp8sync.plan.boxes import Rect, overlapping
from fp8sync.recipe import Encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from fp8sync.manifest import Box, Manifest, TensorInfo

__all__ = ["Held", "Interner", "Side", "Spread", "holdings", "side_of", "unsliced_pairs"]


@dataclass(frozen=True, eq=False)
class Spread:
    """Rectangles of a tensor and, for each, the ranks that hold it (replicas).

    Compared by identity: an `Interner` gives tensors that lie alike the same object.
    """

    rects: tuple[Rect, ...]
    ranks: tuple[tuple[int, ...], ...]

    @cached_property
    def tiled(self) -> bool:
        """Whether no two different rectangles overlap."""
        return not any(overlapping(self.rects))

    @cached_property
    def _sorted(self) -> tuple[int, list[int], list[int], int] | None:
        if len(self.rects) < 16 or not self.rects[0][0]:
            return None
        dims = range(len(self.rects[0][0]))
        dim = max(dims, key=lambda d: len({r[0][d] for r in self.rects}))
        order = sorted(range(len(self.rects)), key=lambda i: self.rects[i][0][dim])
        longest = max(r[1][dim] for r in self.rects)
        return dim, order, [self.rects[i][0][dim] for i in order], longest

    def near(self, wanted: Rect) -> Iterable[int]:
        """Return indices of the rectangles that may overlap `wanted`, in the spread's order."""
        if self._sorted is None:
            return range(len(self.rects))
        dim, order, starts, longest = self._sorted
        low = bisect_right(starts, wanted[0][dim] - longest)
        high = bisect_left(starts, wanted[0][dim] + wanted[1][dim])
        return sorted(order[low:high])


class Interner:
    """Makes spreads, one object for equal ones."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[Rect, ...], tuple[tuple[int, ...], ...]], Spread] = {}

    def __call__(self, rects: tuple[Rect, ...], ranks: tuple[tuple[int, ...], ...]) -> Spread:
        """Return the spread of these rectangles and holders."""
        key = rects, ranks
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Spread(rects, ranks)
        return found


@dataclass(frozen=True, slots=True)
class Side:
    """One side as far as geometry goes: what a forecast needs.

    `unsliced` names FP8 pairs with a box whose blocks are not the HF tensor's.
    """

    tensors: Mapping[str, TensorInfo]
    spreads: Mapping[str, Spread]
    unsliced: frozenset[str] = frozenset()

    @property
    def ranks(self) -> set[int]:
        """All ranks that hold anything."""
        return {r for s in set(self.spreads.values()) for holders in s.ranks for r in holders}


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor's spread, and for each rectangle the boxes of its holders, in the same order."""

    spread: Spread
    boxes: tuple[tuple[Box, ...], ...]

    def each(self) -> Iterator[tuple[Rect, tuple[tuple[int, Box], ...]]]:
        """Yield every rectangle with its (rank, box) pairs."""
        for rect, ranks, boxes in zip(
            self.spread.rects, self.spread.ranks, self.boxes, strict=True
        ):
            yield rect, tuple(zip(ranks, boxes, strict=True))


def holdings(manifest: Manifest, intern: Interner | None = None) -> dict[str, Held]:
    """Return every tensor's holders; rectangles in the order in which ranks and boxes list them."""
    intern = intern or Interner()
    found: dict[str, dict[Rect, dict[int, Box]]] = {}
    for rank, boxes in manifest.ranks.items():
        for box in boxes:
            places = found.setdefault(box.tensor, {}).setdefault((box.start, box.shape), {})
            places.setdefault(rank, box)
    return {
        name: Held(
            intern(tuple(rects), tuple(tuple(holders) for holders in rects.values())),
            tuple(tuple(holders.values()) for holders in rects.values()),
        )
        for name, rects in found.items()
    }


def side_of(manifest: Manifest) -> Side:
    """Return a manifest's geometry."""
    held = holdings(manifest)
    spreads = {name: h.spread for name, h in held.items()}
    return Side(manifest.tensors, spreads, unsliced_pairs(manifest))


def unsliced_pairs(manifest: Manifest) -> frozenset[str]:
    """Return the FP8 pairs of which some box has no scales, or scales of other blocks."""
    pairs = {n for n, i in manifest.tensors.items() if i.encoding is Encoding.BLOCKWISE}
    if not pairs:
        return frozenset()
    boxes = (box for held in manifest.ranks.values() for box in held)
    return frozenset(
        b.tensor for b in boxes if b.tensor in pairs and (b.scale_at is None or b.scale_origin)
    )
