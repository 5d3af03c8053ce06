"""Buckets: what travels in one message, to the byte (docs/wire-format.md).

A bucket's payload is a run of parts. A part is a copy's elements, row-major and contiguous, and for
blockwise copies its scale_inv as float32; each begins at a multiple of 16 bytes.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from fp8sync.manifest import ITEMSIZE
from fp8sync.plan.copy import carried_blocks
from fp8sync.recipe import BLOCK, Encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from fp8sync.plan.copy import Copy

__all__ = [
    "ALIGN",
    "DEFAULT_BUCKET_BYTES",
    "Bucket",
    "Part",
    "fill_buckets",
    "in_parts",
    "in_turns",
    "strips",
]

ALIGN = 16
"""Every part begins at a multiple of this many bytes, so that kernels move 16 bytes a thread."""

DEFAULT_BUCKET_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A copy's place in a bucket's payload; offsets in bytes, `scale_offset` -1 without scales."""

    copy: Copy
    offset: int
    scale_offset: int

    @property
    def padding(self) -> list[tuple[int, int]]:
        """(start, end) of the bytes that follow the elements and the scales up to the next part."""
        ends = [self.offset + self.copy.weight_bytes]
        if self.scale_offset >= 0:
            ends.append(self.scale_offset + self.copy.scale_bytes)
        return [(end, _aligned(end)) for end in ends if end % ALIGN]


@dataclass(frozen=True, slots=True)
class Bucket:
    """One message from one source rank to one destination rank."""

    index: int
    source_rank: int
    destination_rank: int
    parts: tuple[Part, ...]
    nbytes: int


def fill_buckets(copies: Sequence[Copy], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> list[Bucket]:
    """Lay copies out in buckets of at most `bucket_bytes` payload each, in the plan's order.

    A copy larger than a bucket is cut into `strips`. A bucket holds more than `bucket_bytes` only where
    one of them alone does.
    """
    buckets: list[Bucket] = []
    parts: list[Part] = []
    used = 0

    def close() -> None:
        nonlocal used
        if parts:
            copy = parts[0].copy
            route = copy.source_rank, copy.destination_rank
            buckets.append(Bucket(len(buckets), *route, tuple(parts), used))
            parts.clear()
            used = 0

    for copy in strips(copies, bucket_bytes):
        size = _size(copy)
        if parts and (used + size > bucket_bytes or not _same_route(parts[0].copy, copy)):
            close()
        scale_offset = -1
        offset = used
        if copy.encoding is Encoding.BLOCKWISE:
            scale_offset = offset + _aligned(copy.weight_bytes)
        parts.append(Part(copy, offset, scale_offset))
        used += size
    close()
    return buckets


def in_parts(copies: Sequence[Copy], sizes: Sequence[int]) -> list[tuple[Copy, ...]]:
    """Cut a run of copies where its bytes are divided about as `sizes` are; some parts may be empty."""
    ends = list(accumulate(sizes))
    total = sum(c.weight_bytes + c.scale_bytes for c in copies)
    parts: list[list[Copy]] = [[] for _ in sizes]
    before = 0
    for copy in copies:
        reached = min(before * ends[-1] // max(total, 1), ends[-1] - 1)
        parts[bisect(ends, reached)].append(copy)
        before += copy.weight_bytes + copy.scale_bytes
    return [tuple(part) for part in parts]


def in_turns(buckets: Iterable[Bucket]) -> list[list[Bucket]]:
    """Return the first buckets of every route (source and destination), then the second, and so on."""
    sent: Counter[tuple[int, int]] = Counter()
    turns: list[list[Bucket]] = []
    for bucket in buckets:
        route = bucket.source_rank, bucket.destination_rank
        if sent[route] == len(turns):
            turns.append([])
        turns[sent[route]].append(bucket)
        sent[route] += 1
    return turns


def strips(copies: Iterable[Copy], nbytes: int) -> Iterator[Copy]:
    """Yield copies, those of more than `nbytes` cut along their first dim.

    Blockwise ones are cut at multiples of 128 rows of the HF tensor, and are never narrower.
    """
    for copy in copies:
        if _size(copy) <= nbytes or not copy.shape:
            yield copy
            continue
        row_bytes = math.prod(copy.shape[1:]) * ITEMSIZE[copy.dtype]
        blockwise = copy.encoding is Encoding.BLOCKWISE
        unit = BLOCK if blockwise else 1
        rows = max(unit, nbytes // max(row_bytes, 1) // unit * unit)
        if blockwise and rows > unit:
            rows -= unit  # leaves room for the scales
        # Strips of a copy that begins inside a block still end where blocks do.
        begun = copy.start[0] % BLOCK if blockwise else 0
        edges = [0, *range(rows - begun, copy.shape[0], rows), copy.shape[0]]
        for first, last in pairwise(edges):
            yield _strip(copy, first, last - first)


def _strip(copy: Copy, first: int, rows: int) -> Copy:
    index = (first, *(0 for _ in copy.shape[1:]))
    start = (copy.start[0] + first, *copy.start[1:])
    shape = (rows, *copy.shape[1:])
    scale_at, source_scale_at = copy.scale_at, copy.source_scale_at
    blocks = carried_blocks((start, shape), whole_grid=scale_at is None)[0]
    moved = [b - a for a, b in zip(copy.scale_rect[0], blocks, strict=True)]
    if scale_at is not None:
        scale_at = scale_at.at(moved)
    source_origin = copy.source_origin
    if source_scale_at is not None and source_origin:
        local = [i + o for i, o in zip(index, source_origin, strict=True)]
        source_scale_at = source_scale_at.at([i // BLOCK for i in local])
        source_origin = tuple(i % BLOCK for i in local)
    elif source_scale_at is not None:
        source_scale_at = source_scale_at.at(moved)
    return replace(
        copy,
        start=start,
        shape=shape,
        source_at=copy.source_at.at(index),
        at=copy.at.at(index),
        scale_at=scale_at,
        source_scale_at=source_scale_at,
        source_origin=source_origin,
    )


def _same_route(a: Copy, b: Copy) -> bool:
    return (a.source_rank, a.destination_rank) == (b.source_rank, b.destination_rank)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def _size(copy: Copy) -> int:
    size = _aligned(copy.weight_bytes)
    if copy.encoding is Encoding.BLOCKWISE:
        size += _aligned(copy.scale_bytes)
    return size
