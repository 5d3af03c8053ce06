"""From a layout's pieces to a manifest, or to the geometry alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fp8sync.manifest import Box, Manifest, Placement
from fp8sync.plan.merge import merged
from fp8sync.plan.spread import Interner, Side
from fp8sync.recipe import BLOCK, Encoding

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence

    from fp8sync.layouts.models import ModelShape, TensorShape
    from fp8sync.manifest import TensorInfo
    from fp8sync.plan.boxes import Rect
    from fp8sync.plan.spread import Spread

__all__ = [
    "Layout",
    "Piece",
    "chunks",
    "even_split",
    "geometry",
    "join",
    "join_sides",
    "manifest",
    "piece_of_matrix",
]


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a tensor, where it lies in each of its holders' storages, and who they are."""

    box: Box
    ranks: tuple[int, ...]


class Layout(Protocol):
    """A way to spread a model over ranks."""

    def infos(self, model: ModelShape) -> list[TensorInfo]:
        """Return the model's tensors as this side holds them."""

    def pieces(self, tensor: TensorShape, model: ModelShape) -> list[Piece]:
        """Return where a tensor of the model lies."""

    def alike(self, tensor: TensorShape, model: ModelShape) -> Hashable:
        """Return a key: tensors with the same key lie alike, in storages of their own."""


def manifest(layout: Layout, model: ModelShape) -> Manifest:
    """Return the manifest of all ranks that `layout` spreads `model` over."""
    ranks: dict[int, list[Box]] = {}
    for tensor in model.tensors:
        for piece in layout.pieces(tensor, model):
            for rank in piece.ranks:
                ranks.setdefault(rank, []).append(piece.box)
    return Manifest.of(layout.infos(model), ranks)


def geometry(layout: Layout, model: ModelShape) -> Side:
    """Return what a forecast needs, in a fraction of the manifest's time and memory."""
    intern = Interner()
    infos = {info.name: info for info in layout.infos(model)}
    known: dict[Hashable, tuple[Spread, bool]] = {}
    spreads, unsliced = {}, set()
    for tensor in model.tensors:
        key = layout.alike(tensor, model)
        if key not in known:
            pieces = layout.pieces(tensor, model)
            bare = any(p.box.scale_at is None or p.box.scale_origin for p in pieces)
            known[key] = _spread(pieces, intern), bare
        spreads[tensor.name], bare = known[key]
        if bare and infos[tensor.name].encoding is Encoding.BLOCKWISE:
            unsliced.add(tensor.name)
    return Side(infos, spreads, frozenset(unsliced))


def _spread(pieces: Iterable[Piece], intern: Interner) -> Spread:
    places: dict[Rect, tuple[int, ...]] = {}
    for piece in pieces:
        rect = piece.box.start, piece.box.shape
        # As a manifest lists them, whose order decides who sends: tied weights are of two stages.
        places[rect] = (
            tuple(sorted((*places[rect], *piece.ranks))) if rect in places else piece.ranks
        )
    return intern(tuple(places), tuple(places.values()))


def join(manifests: Sequence[Manifest]) -> Manifest:
    """Return several engines as one destination: their ranks follow one another.

    What one of them has to take whole (`misc`) all do, as at a link.

    Raises:
        ValueError: two engines want the same tensor differently.
    """
    tensors: dict[str, TensorInfo] = {}
    ranks: dict[int, Sequence[Box]] = {}
    for number, one in enumerate(manifests):
        for name, info in one.tensors.items():
            tensors[name] = _joint(tensors.get(name, info), info, number)
        first = max(ranks, default=-1) + 1
        ranks |= {first + rank: boxes for rank, boxes in one.ranks.items()}
    return Manifest.of(tensors.values(), ranks)


def join_sides(sides: Sequence[Side]) -> Side:
    """Return the geometry of several engines as one destination, as `join` does for manifests.

    Raises:
        ValueError: two engines want the same tensor differently.
    """
    if len(sides) == 1:
        return sides[0]
    intern = Interner()
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, dict[Rect, tuple[int, ...]]] = {}
    first = 0
    for number, side in enumerate(sides):
        for name, info in side.tensors.items():
            tensors[name] = _joint(tensors.get(name, info), info, number)
        for name, spread in side.spreads.items():
            found = places.setdefault(name, {})
            for rect, ranks in zip(spread.rects, spread.ranks, strict=True):
                found[rect] = (*found.get(rect, ()), *(first + r for r in ranks))
        first += max(side.ranks, default=-1) + 1
    spreads = {n: intern(tuple(p), tuple(p.values())) for n, p in places.items()}
    return Side(tensors, spreads)


def _joint(known: TensorInfo, info: TensorInfo, engine: int) -> TensorInfo:
    joint = merged(known, info)
    if joint is None:
        raise ValueError(f"engine {engine}: expected {known}, found {info}")
    return joint


def even_split(count: int, parts: int) -> tuple[int, ...]:
    """Return `parts` sizes that differ by at most one, larger ones first."""
    size, more = divmod(count, parts)
    return tuple(size + (i < more) for i in range(parts))


def chunks(length: int, parts: int) -> list[tuple[int, int]]:
    """Return (start, size) as `torch.chunk` cuts, with empty chunks at the end where it gives fewer."""
    step = -(-length // parts)
    return [(min(i * step, length), max(0, min(step, length - i * step))) for i in range(parts)]


def piece_of_matrix(
    tensor: TensorShape,
    span: tuple[int, int, int],
    storage: str,
    size: Sequence[int],
    at: int,
    ranks: tuple[int, ...],
    *,
    base: tuple[int, int] = (0, 0),
    scale_rows: Mapping[int, int] | None = None,
    scales: bool = False,
) -> Piece:
    """Return the piece `span` = (dim, start, length) of a tensor inside a contiguous local storage.

    Args:
        tensor: the HF tensor.
        span: what of it: `length` elements of `dim` from `start` on, everything in other dims.
        storage: local storage.
        size: shape of the local matrix within the storage (or vector).
        at: where along `dim` the piece begins in the local matrix.
        ranks: who holds it there.
        base: elements before the matrix in its storage, and in the storage of its scales.
        scale_rows: block row for a row `at`, where it is not `at // 128`.
        scales: whether the storage has scales beside it.
    """
    dim, start, length = span
    origin = tuple(start if d == dim else 0 for d in range(len(tensor.shape)))
    shape = tuple(length if d == dim else n for d, n in enumerate(tensor.shape))
    strides = tuple(_strides(size))
    scale_at = None
    if scales:
        blocks = _strides([-(-n // BLOCK) for n in size])
        row = (scale_rows or {}).get(at, at // BLOCK)
        scale_at = Placement(storage + "_scale_inv", base[1] + row * blocks[dim], tuple(blocks))
    place = Placement(storage, base[0] + at * strides[dim], strides)
    return Piece(Box(tensor.name, origin, shape, place, scale_at), ranks)


def _strides(size: Iterable[int]) -> list[int]:
    strides, step = [], 1
    for n in reversed(list(size)):
        strides.append(step)
        step *= n
    return strides[::-1]
