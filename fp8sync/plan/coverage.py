"""Does the engine use all of every tensor? A narrowing loader would drop rows without a word."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from itertools import pairwise, product
from typing import TYPE_CHECKING

from fp8sync.errors import TensorMismatch
from fp8sync.plan.boxes import Rect, volume

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp8sync.manifest import Manifest

__all__ = ["check_all_used", "union_volume"]


def check_all_used(destination: Manifest) -> None:
    """Check that all engine ranks together take every element of every tensor.

    Raises:
        TensorMismatch: naming each tensor of which the engine takes only a part.
    """
    rects: dict[str, set[Rect]] = defaultdict(set)
    for boxes in destination.ranks.values():
        for box in boxes:
            rects[box.tensor].add((box.start, box.shape))
    faults = []
    for name, info in destination.tensors.items():
        used = union_volume(rects[name])
        if used != info.numel:
            faults.append(
                f"{name}: trainer shape {info.shape} has {info.numel} elements, "
                f"the engine's ranks take {used}"
            )
    if faults:
        raise TensorMismatch("the engine would use only a part of these tensors", faults)


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
