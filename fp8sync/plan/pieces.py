"""A copy as rectangles that are each quantized in one way: with their own amax, or with a given one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8sync.plan.boxes import Rect, overlap, subtract
from fp8sync.recipe import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp8sync.plan.amax import AmaxGroup
    from fp8sync.plan.copy import Copy

__all__ = ["Piece", "pieces"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a copy.

    Args:
        rect: in elements of the HF tensor.
        given: index of the group whose amax is to be used; None: whole blocks, which have their own.
        carries: whether the scale_inv of its blocks belongs to the copy. If not, every block it touches
            begins in another copy, which carries it.
    """

    rect: Rect
    given: int | None
    carries: bool


def pieces(copy: Copy, groups: Sequence[AmaxGroup]) -> Iterator[Piece]:
    """Yield the disjoint pieces of a blockwise copy.

    Args:
        copy: any; one that no group touches is one piece.
        groups: those of the copy's tensor that its source rank takes part in.
    """
    first, size = copy.scale_rect
    carried = _elements((first, size))
    left = [copy.rect]
    for number, group in enumerate(groups):
        area = _elements((group.start, group.shape))
        still: list[Rect] = []
        for rect in left:
            common = overlap(rect, area)
            if common is None:
                still.append(rect)
                continue
            still += subtract(rect, common)
            begun = overlap(common, carried)
            if begun is None:
                yield Piece(common, number, carries=False)
                continue
            yield Piece(begun, number, carries=True)
            for rest in subtract(common, begun):
                yield Piece(rest, number, carries=False)
        left = still
    for rect in left:
        yield Piece(rect, None, carries=True)


def _elements(blocks: Rect) -> Rect:
    start, shape = blocks
    return tuple(a * BLOCK for a in start), tuple(n * BLOCK for n in shape)
