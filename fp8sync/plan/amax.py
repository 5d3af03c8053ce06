"""Blocks that lie on several trainer ranks: who must agree on their amax before quantizing.

A BF16 weight may be cut anywhere; its scale may not. Each holder of a part of a block computes the
part's amax, the holders exchange the maximum, and each quantizes its own elements with it: a few
floats per cut block, and the weight itself stays on the bulk path.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from fp8sync.plan.boxes import Rect, block_shape, misaligned_dim, overlap, touched_blocks
from fp8sync.recipe import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp8sync.manifest import Placement
    from fp8sync.plan.spread import Held, Spread

__all__ = ["AmaxGroup", "AmaxPart", "CutBlocks", "amax_groups", "cut_blocks", "teams"]


@dataclass(frozen=True, slots=True)
class AmaxPart:
    """What one rank holds of a group's blocks: a rectangle of the HF tensor, and where it lies."""

    rank: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    at: Placement


@dataclass(frozen=True, slots=True)
class AmaxGroup:
    """A rectangle of blocks, none of which one box holds whole, and the parts that make it up.

    The blocks' amax is the element-wise maximum of `partial_amax` over all parts. Every rank named
    needs it. A group of one rank (a fused tensor cut inside a block on the same rank) needs no
    exchange. `start` and `shape` are in blocks of the whole tensor.
    """

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[AmaxPart, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The trainer ranks that take part, in order."""
        return tuple(sorted({p.rank for p in self.parts}))

    def to_json(self) -> list[Any]:
        """Return `[tensor, [start], [shape], [[rank, [start], [shape], at], ...]]`."""
        parts = [[p.rank, list(p.start), list(p.shape), p.at.to_json()] for p in self.parts]
        return [self.tensor, list(self.start), list(self.shape), parts]


@dataclass(frozen=True, slots=True)
class CutBlocks:
    """The geometry of a group: blocks, and (index of the source rectangle, part of it) by holder."""

    blocks: Rect
    parts: tuple[tuple[int, Rect], ...]


def cut_blocks(spread: Spread, shape: Sequence[int]) -> tuple[CutBlocks, ...]:
    """Return the blocks of a tensor of `shape` that some source rectangle cuts."""
    if all(misaligned_dim(rect, shape) is None for rect in spread.rects):
        return ()
    grid = block_shape(shape)
    bands = sorted({b for r in spread.rects for b in _frame(r, shape, grid, spread.tiled)})
    edges = [sorted({e for s, n in bands for e in (s[d], s[d] + n[d])}) for d in range(len(grid))]
    cells: dict[tuple[int, ...], None] = {}
    for start, size in bands:
        spans = [
            range(bisect_left(e, a), bisect_left(e, a + n))
            for e, a, n in zip(edges, start, size, strict=True)
        ]
        cells |= dict.fromkeys(product(*spans))
    widths = [list(pairwise(e)) for e in edges]
    found: list[CutBlocks] = []
    for cell in sorted(cells):
        bounds = [widths[d][i] for d, i in enumerate(cell)]
        blocks = tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds)
        holders = tuple(_holders(spread, blocks, shape))
        if found and _joins(found[-1], blocks, holders):
            blocks = _joined(found.pop().blocks, blocks)
            holders = tuple(_holders(spread, blocks, shape))
        found.append(CutBlocks(blocks, holders))
    return tuple(found)


def amax_groups(tensor: str, held: Held, geometry: Sequence[CutBlocks]) -> Iterator[AmaxGroup]:
    """Yield a tensor's groups: one for each set of replicas, where all parts have as many."""
    for cut in geometry:
        counts = {len(held.boxes[i]) for i, _ in cut.parts}
        teams = [[(i, [j]) for i, _ in cut.parts] for j in range(max(counts))]
        if len(counts) > 1:
            teams = [[(i, list(range(len(held.boxes[i])))) for i, _ in cut.parts]]
        for team in teams:
            parts = [
                _part(held, i, j, rect)
                for (i, whose), (_, rect) in zip(team, cut.parts, strict=True)
                for j in whose
            ]
            yield AmaxGroup(tensor, *cut.blocks, tuple(parts))


def _part(held: Held, i: int, j: int, rect: Rect) -> AmaxPart:
    box = held.boxes[i][j]
    within = [a - b for a, b in zip(rect[0], box.start, strict=True)]
    return AmaxPart(held.spread.ranks[i][j], *rect, box.at.at(within))


def _frame(rect: Rect, shape: Sequence[int], grid: Sequence[int], tiled: bool) -> Iterator[Rect]:
    """Yield the blocks that the edges of `rect` cut; whole bands where replicas are cut differently."""
    first, size = touched_blocks(rect)
    for dim, (start, length, full) in enumerate(zip(rect[0], rect[1], shape, strict=True)):
        end = start + length
        cut = {start // BLOCK} if start % BLOCK else set()
        cut |= {end // BLOCK} if end % BLOCK and end != full else set()
        for block in cut:
            low = [0] * len(grid) if not tiled else [*first]
            wide = [*grid] if not tiled else [*size]
            low[dim], wide[dim] = block, 1
            yield tuple(low), tuple(wide)


def _holders(spread: Spread, blocks: Rect, shape: Sequence[int]) -> Iterator[tuple[int, Rect]]:
    start = tuple(b * BLOCK for b in blocks[0])
    ends = [min((b + n) * BLOCK, full) for b, n, full in zip(*blocks, shape, strict=True)]
    area = start, tuple(e - a for a, e in zip(start, ends, strict=True))
    for i in spread.near(area):
        common = overlap(area, spread.rects[i])
        if common is not None:
            yield i, common


def _joins(before: CutBlocks, blocks: Rect, holders: tuple[tuple[int, Rect], ...]) -> bool:
    """Whether `blocks` continue `before` along the last dim, on the same holders."""
    (a, an), (b, bn) = before.blocks, blocks
    adjacent = a[:-1] == b[:-1] and an[:-1] == bn[:-1] and a[-1] + an[-1] == b[-1]
    return adjacent and [i for i, _ in before.parts] == [i for i, _ in holders]


def _joined(a: Rect, b: Rect) -> Rect:
    return a[0], (*a[1][:-1], a[1][-1] + b[1][-1])


def teams(groups: Sequence[AmaxGroup]) -> dict[tuple[int, ...], tuple[AmaxGroup, ...]]:
    """Return the groups by team: the ranks that share blocks, directly or through one another.

    No rank is in two teams. A team lays its groups' blocks out one after another, in the order given
    here, and takes the maximum over its ranks once.

    Args:
        groups: of all ranks.
    """
    shared: dict[tuple[int, ...], list[AmaxGroup]] = defaultdict(list)
    for group in groups:
        shared[group.ranks].append(group)
    team: dict[int, set[int]] = {}
    for ranks in shared:
        joined = set().union(*(team.get(rank, {rank}) for rank in ranks))
        team |= dict.fromkeys(joined, joined)
    found: dict[tuple[int, ...], list[AmaxGroup]] = defaultdict(list)
    for ranks, members in sorted(shared.items()):
        found[tuple(sorted(team[ranks[0]]))] += members
    return {ranks: tuple(members) for ranks, members in sorted(found.items())}
