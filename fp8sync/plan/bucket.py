"""Buckets: what travels in one message, to the byte (docs/wire-format.md).

A bucket's payload is a run of parts. A part is a copy's elements, row-major and contiguous, and for
blockwise copies its scale_inv as float32; each begins at a multiple of 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fp8sync.manifest import ITEMSIZE
from fp8sync.plan.boxes import block_shape
from fp8sync.plan.build import Copy
from fp8sync.recipe import BLOCK, Encoding

__all__ = ["ALIGN", "DEFAULT_BUCKET_BYTES", "Bucket", "Part", "fill_buckets"]

ALIGN = 16
"""Every part begins at a multiple of this many bytes, so that kernels move 16 bytes a thread."""

DEFAULT_BUCKET_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A copy's place in a bucket's payload; offsets in bytes, `scale_offset` -1 without scales."""

    copy: Copy
    offset: int
    scale_offset: int


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

    A copy larger than a bucket is cut along its first dim, blockwise ones at multiples of 128 rows.
    A bucket holds more than `bucket_bytes` only where one such strip alone does.
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

    for copy in _strips(copies, bucket_bytes):
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


def _strips(copies: Sequence[Copy], bucket_bytes: int) -> Iterator[Copy]:
    for copy in copies:
        if _size(copy) <= bucket_bytes or not copy.shape:
            yield copy
            continue
        row_bytes = math.prod(copy.shape[1:]) * ITEMSIZE[copy.dtype]
        unit = BLOCK if copy.encoding is Encoding.BLOCKWISE else 1
        rows = max(unit, bucket_bytes // max(row_bytes, 1) // unit * unit)
        if copy.encoding is Encoding.BLOCKWISE and rows > unit:
            rows -= unit  # leaves room for the scales
        for first in range(0, copy.shape[0], rows):
            yield _strip(copy, first, min(rows, copy.shape[0] - first))


def _strip(copy: Copy, first: int, rows: int) -> Copy:
    index = (first, *(0 for _ in copy.shape[1:]))
    scale_at = copy.scale_at
    return replace(
        copy,
        start=(copy.start[0] + first, *copy.start[1:]),
        shape=(rows, *copy.shape[1:]),
        source_at=copy.source_at.at(index),
        at=copy.at.at(index),
        scale_at=scale_at and scale_at.at([i // BLOCK for i in index]),
    )


def _same_route(a: Copy, b: Copy) -> bool:
    return (a.source_rank, a.destination_rank) == (b.source_rank, b.destination_rank)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def _size(copy: Copy) -> int:
    size = _aligned(copy.weight_bytes)
    if copy.encoding is Encoding.BLOCKWISE:
        size += _aligned(4 * math.prod(block_shape(copy.shape)))
    return size
