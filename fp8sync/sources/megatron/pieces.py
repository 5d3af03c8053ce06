"""Which rectangle of which HF tensor lies in which rectangle of a local parameter. Pure integers.

A *shard* is this rank's (index, count) along the tensor-parallel axis of the grid that the parameter
belongs to: the dense one, or that of the experts. A fused parameter is described by *runs*: the rows
of its full tensor in order, each run a row range of one HF tensor; a shard is a slice of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["Layout", "Piece", "Run", "columns", "concatenated", "fused", "rows", "whole"]

Shape = tuple[int, ...]
Shard = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of `shape` that starts at `start` in HF tensor `tensor` and at `local` here."""

    tensor: str
    start: Shape
    local: Shape
    shape: Shape


@dataclass(frozen=True, slots=True)
class Run:
    """`count` rows of HF tensor `tensor`, from row `first` on; without a tensor, padding."""

    tensor: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The pieces of one local parameter, and the full shapes of the HF tensors they belong to."""

    shapes: Mapping[str, Shape]
    pieces: tuple[Piece, ...]


def whole(tensor: str, local: Shape) -> Layout:
    """The parameter is the HF tensor."""
    zero = (0,) * len(local)
    return Layout({tensor: local}, (Piece(tensor, zero, zero, local),))


def rows(tensor: str, local: Shape, shard: Shard, full_rows: int | None = None) -> Layout:
    """A slice along dim 0; where `full_rows` is less than all shards hold, the rest is padding.

    Raises:
        ValueError: all shards together hold less than `full_rows`.
    """
    held = local[0] * shard[1]
    full = held if full_rows is None else full_rows
    return fused([Run(tensor, 0, full), Run("", 0, max(0, held - full))], local, shard)


def columns(tensor: str, local: Shape, shard: Shard) -> Layout:
    """A slice along dim 1; a vector (a bias) is whole on every rank."""
    if len(local) == 1:
        return whole(tensor, local)
    index, count = shard
    full = (local[0], local[1] * count, *local[2:])
    zero = (0,) * len(local)
    start = (0, local[1] * index, *zero[2:])
    return Layout({tensor: full}, (Piece(tensor, start, zero, local),))


def concatenated(tensors: Sequence[str], local: Shape, shard: Shard) -> Layout:
    """Shards of equally large tensors, one below the other: `[gate_shard; up_shard]`.

    Raises:
        ValueError: the rows cannot be divided among the tensors.
    """
    index, count = shard
    each, rest = divmod(local[0], len(tensors))
    if rest:
        raise ValueError(f"{local[0]} rows cannot hold {len(tensors)} shards of equal size")
    tail = local[1:]
    zero = (0,) * len(tail)
    return Layout(
        dict.fromkeys(tensors, (each * count, *tail)),
        tuple(
            Piece(tensor, (each * index, *zero), (each * n, *zero), (each, *tail))
            for n, tensor in enumerate(tensors)
        ),
    )


def fused(runs: Iterable[Run], local: Shape, shard: Shard) -> Layout:
    """A slice along dim 0 of a tensor made of runs, wherever the slice cuts them.

    Raises:
        ValueError: the runs do not have as many rows as all shards together.
    """
    index, count = shard
    runs = list(runs)
    total = sum(run.count for run in runs)
    if total != local[0] * count:
        raise ValueError(
            f"expected {total} rows on all {count} ranks together, found {local[0]} on this one"
        )
    tail = local[1:]
    zero = (0,) * len(tail)
    full: dict[str, int] = {}
    for run in runs:
        if run.tensor:
            full[run.tensor] = max(full.get(run.tensor, 0), run.first + run.count)
    pieces = (
        Piece(run.tensor, (run.first, *zero), (at, *zero), (run.count, *tail))
        for at, run in _cut(_joined(runs), local[0] * index, local[0])
        if run.tensor
    )
    return Layout({tensor: (n, *tail) for tensor, n in full.items()}, tuple(pieces))


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Join neighbours that go on where the one before ends."""
    last: Run | None = None
    for run in runs:
        if not run.count:
            continue
        if last and last.tensor == run.tensor and last.first + last.count == run.first:
            last = Run(last.tensor, last.first, last.count + run.count)
            continue
        if last:
            yield last
        last = run
    if last:
        yield last


def _cut(runs: Iterable[Run], begin: int, count: int) -> Iterator[tuple[int, Run]]:
    """Yield (row within the slice, run) for the part of each run inside [begin, begin + count)."""
    at = 0
    for run in runs:
        low, high = max(at, begin), min(at + run.count, begin + count)
        if low < high:
            yield low - begin, Run(run.tensor, run.first + low - at, high - low)
        at += run.count
