"""Geometry of boxes: overlap, difference, tiling and block alignment. Pure integers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fp8sync.recipe import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "Rect",
    "block_shape",
    "contiguous",
    "misaligned_dim",
    "overlap",
    "overlapping",
    "span",
    "subtract",
    "touched_blocks",
    "volume",
]

Rect = tuple[tuple[int, ...], tuple[int, ...]]
"""(start, shape), both in elements."""


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a row-major tensor without gaps."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


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


def subtract(whole: Rect, part: Rect) -> list[Rect]:
    """Return disjoint rectangles that fill `whole` without `part`, which lies within it."""
    rest = []
    start, shape = list(whole[0]), list(whole[1])
    for dim, (low, size) in enumerate(zip(part[0], part[1], strict=True)):
        before, after = low - start[dim], start[dim] + shape[dim] - low - size
        for first, length in ((start[dim], before), (low + size, after)):
            if length:
                strip = [*start], [*shape]
                strip[0][dim], strip[1][dim] = first, length
                rest.append((tuple(strip[0]), tuple(strip[1])))
        start[dim], shape[dim] = low, size
    return rest


def overlapping(rects: Sequence[Rect]) -> Iterator[tuple[int, int]]:
    """Yield index pairs of overlapping rectangles (a sweep along the dim that tells most apart)."""
    if len(rects) < 2:
        return
    dims = range(len(rects[0][0]))
    dim = max(dims, key=lambda d: len({r[0][d] for r in rects}), default=None)
    if dim is None:  # scalars
        yield from ((j, i) for i in range(len(rects)) for j in range(i))
        return
    order = sorted(range(len(rects)), key=lambda i: rects[i][0][dim])
    active: list[int] = []
    for i in order:
        start = rects[i][0][dim]
        active = [j for j in active if rects[j][0][dim] + rects[j][1][dim] > start]
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


def touched_blocks(rect: Rect) -> Rect:
    """Return the rectangle of blocks that `rect` touches, in blocks of the whole tensor."""
    first = tuple(a // BLOCK for a in rect[0])
    return first, tuple(
        -(-(a + n) // BLOCK) - f for a, n, f in zip(rect[0], rect[1], first, strict=True)
    )


def span(rect: Rect) -> str:
    """Return `rect` as text, as an index would be written."""
    return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(*rect, strict=True)) + "]"
