"""Do all ranks of a side together have all of every tensor? A narrowing loader drops rows without a word."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from itertools import pairwise, product
from typing import TYPE_CHECKING

from fp8sync.errors import TensorMismatch, UnsupportedLayout
from fp8sync.plan.boxes import Rect, overlap, overlapping, span, volume

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fp8sync.manifest import Manifest

__all__ = ["check_all_held", "check_all_used", "check_tiling", "remainder", "union_volume"]


def check_all_used(destination: Manifest) -> None:
    """Check that all engine ranks together take every element of every tensor.

    Those of which all of them take nothing, and say why, are left out.

    Raises:
        TensorMismatch: naming each tensor of which the engine takes only a part.
    """
    faults = [
        f"{name} (all {len(destination.ranks)} engine ranks): expected to take all "
        f"{destination.tensors[name].numel} elements of shape {destination.tensors[name].shape}, "
        f"found {used} taken"
        for name, used in _incomplete(destination)
        if used or not destination.tensors[name].unused
    ]
    if faults:
        raise TensorMismatch("the engine would use only a part of these tensors", faults)


def remainder(whole: Rect, rects: Iterable[Rect]) -> list[Rect]:
    """Return rectangles that tile what `rects` leave of `whole`."""
    left = [whole]
    for rect in rects:
        left = [piece for old in left for piece in _without(old, rect)]
    return left


def _without(rect: Rect, hole: Rect) -> Iterator[Rect]:
    common = overlap(rect, hole)
    if common is None:
        yield rect
        return
    start, shape = list(rect[0]), list(rect[1])
    for dim, (first, length) in enumerate(zip(*common, strict=True)):
        before, end = first - start[dim], start[dim] + shape[dim]
        for low, size in ((start[dim], before), (first + length, end - first - length)):
            if size:
                begin, extent = (*start[:dim], low), (*shape[:dim], size)
                yield (*begin, *start[dim + 1 :]), (*extent, *shape[dim + 1 :])
        start[dim], shape[dim] = first, length


def check_all_held(source: Manifest) -> None:
    """Check that all trainer ranks together hold every element of every tensor.

    Raises:
        UnsupportedLayout: naming each tensor with a hole.
    """
    _refuse(_holes(source))


def check_tiling(source: Manifest) -> None:
    """Check that the boxes of all trainer ranks tile every tensor exactly once.

    Ranks with the same rectangle are replicas of it and count once.

    Raises:
        UnsupportedLayout: naming each tensor with a hole or with rectangles that overlap.
    """
    faults = list(_holes(source))
    for name, rects in _rects(source).items():
        listed = sorted(rects)
        clash = next(overlapping(listed), None)
        if clash:
            both = " and ".join(span(listed[i]) for i in clash)
            faults.append(f"{name}: expected every element once, found {both}, which overlap")
    _refuse(faults)


def _refuse(faults: Iterable[str]) -> None:
    listed = list(faults)
    if listed:
        raise UnsupportedLayout("the trainer's ranks do not hold whole tensors", listed)


def _holes(source: Manifest) -> Iterator[str]:
    for name, held in _incomplete(source):
        info = source.tensors[name]
        yield (
            f"{name}: expected {info.numel} elements of {list(info.shape)}, "
            f"found {held} on all trainer ranks together"
        )


def _incomplete(side: Manifest) -> Iterator[tuple[str, int]]:
    """Yield each tensor of which a side has only a part, and how many elements that part has."""
    rects = _rects(side)
    known: dict[frozenset[Rect], int] = {}  # most tensors of a model are cut alike
    for name, info in side.tensors.items():
        own = frozenset(rects[name])
        found = known.get(own)
        if found is None:
            found = known[own] = union_volume(own)
        if found != info.numel:
            yield name, found


def _rects(side: Manifest) -> dict[str, set[Rect]]:
    rects: dict[str, set[Rect]] = defaultdict(set)
    for boxes in side.ranks.values():
        for box in boxes:
            rects[box.tensor].add((box.start, box.shape))
    return rects


def union_volume(rects: Iterable[Rect]) -> int:
    """Return the number of elements covered by at least one of `rects`."""
    unique = list(rects)
    if len(unique) < 2:
        return sum(volume(r) for r in unique)
    dims = range(len(unique[0][0]))
    edges = [sorted({e for s, n in unique for e in (s[d], s[d] + n[d])}) for d in dims]
    covered: set[tuple[int, ...]] = set()
    for start, shape in unique:
        spans = [
            range(bisect_left(edges[d], start[d]), bisect_left(edges[d], start[d] + shape[d]))
            for d in dims
        ]
        covered.update(product(*spans))
    widths = [[b - a for a, b in pairwise(edge)] for edge in edges]
    total = 0
    for cell in covered:
        size = 1
        for d, i in enumerate(cell):
            size *= widths[d][i]
        total += size
    return total
