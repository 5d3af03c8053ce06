"""Geometry of boxes: overlap, tiling and block alignment. Pure integers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fp8sync.recipe import BLOCK

__all__ = ["Rect", "block_shape", "misaligned_dim", "overlap", "overlapping", "volume"]

Rect = tuple[tuple[int, ...], tuple[int, ...]]
"""(start, shape), both in elements."""


def volume(rect: Rect) -> int:
    """Return the number of elements in `rect`."""
    return math.prod(rect[1])


def overlap(a: Rect, b: Rect) -> Rect | None:
    """Return the rectangle common to `a` and `b`, or None where they do not meet."""
    start, shape = [], []
    for a0, an, b0, bn in zip(a[0], a[1], b[0], b[1], strict=True):
        low, high = max(a0, b0), min(a0 + an, b0 + bn)
        if low >= high:
            return None
        start.append(low)
        shape.append(high - low)
    return tuple(start), tuple(shape)


def overlapping(rects: Sequence[Rect]) -> Iterator[tuple[int, int]]:
    """Yield index pairs of overlapping rectangles (a sweep along the first dim)."""
    order = sorted(range(len(rects)), key=lambda i: rects[i])
    active: list[int] = []
    for i in order:
        start = rects[i][0]
        active = [j for j in active if not start or rects[j][0][0] + rects[j][1][0] > start[0]]
        yield from ((j, i) for j in active if overlap(rects[j], rects[i]))
        active.append(i)


def misaligned_dim(rect: Rect, shape: Sequence[int]) -> int | None:
    """Return the first dim in which `rect` cuts a 128-block of a tensor of `shape`, or None.

    Slicing weight and scale_inv is exact iff every boundary is a multiple of 128 or the tensor's end.
    """
    for dim, (start, size, full) in enumerate(zip(rect[0], rect[1], shape, strict=True)):
        end = start + size
        if start % BLOCK or (end % BLOCK and end != full):
            return dim
    return None


def block_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of `scale_inv` for a weight of `shape`: ceil(n / 128) in each dim."""
    return tuple(-(-n // BLOCK) for n in shape)
