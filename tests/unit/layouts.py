"""Random layouts of a few HF tensors on a few ranks, and what brute force says of them.

A side is a list of boxes in one-dimensional storages, each box with an offset, a pitch and an order
of dims of its own, so strides of every kind occur.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np
import torch
from hypothesis import strategies as st

from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.recipe import BLOCK, Encoding, Formula

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp8sync.plan import Copy

LENGTHS = (1, 64, 127, 128, 129, 192, 256, 300, 576)
"""Lengths of blockwise tensors: whole blocks, and ragged ones on both sides of a multiple."""


@dataclass
class Side:
    """A side under construction: its boxes by rank, and how many elements each storage has."""

    ranks: dict[int, list[Box]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def manifest(self, infos: Sequence[TensorInfo]) -> Manifest:
        return Manifest.of(infos, self.ranks)


def cuts(length: int, unit: int) -> st.SearchStrategy[list[int]]:
    """Increasing edges from 0 to `length`, the inner ones multiples of `unit`."""
    inner = range(unit, length, unit)
    chosen = st.sets(st.sampled_from(inner), max_size=3) if inner else st.just(set())
    return chosen.map(lambda edges: [0, *sorted(edges), length])


@st.composite
def grid(draw: st.DrawFn, shape: Sequence[int], unit: int) -> list[tuple[tuple[int, ...], ...]]:
    """Rectangles (start, shape) that tile a tensor of `shape`."""
    spans = [list(pairwise(draw(cuts(length, unit)))) for length in shape]
    return [
        (tuple(low for low, _ in cell), tuple(high - low for low, high in cell))
        for cell in product(*spans)
    ]


@st.composite
def placed(draw: st.DrawFn, side: Side, name: str, shape: Sequence[int]) -> Placement:
    """A strided place for a rectangle of `shape` in a new storage of `side`."""
    order = draw(st.permutations(range(len(shape))))
    strides = [0] * len(shape)
    step = draw(st.integers(1, 2))
    for dim in order:
        strides[dim] = step
        step = step * shape[dim] + draw(st.integers(0, 3))
    offset = draw(st.integers(0, 5))
    size = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    side.sizes[name] = size + draw(st.integers(0, 3))
    return Placement(name, offset, tuple(strides))


@st.composite
def sides(
    draw: st.DrawFn,
    infos: Sequence[TensorInfo],
    *,
    unit: int = 1,
    ranks: int = 3,
    replicas: int = 1,
    scales: bool = False,
) -> Side:
    """A side that holds every tensor of `infos`, each cell of a random grid on `replicas` ranks."""
    side = Side({rank: [] for rank in range(ranks)})
    for info in infos:
        for number, (start, shape) in enumerate(draw(grid(info.shape, unit))):
            owners = draw(st.permutations(range(ranks)))[:replicas]
            for rank in owners:
                storage = f"{info.name}/{number}@{rank}"
                at = draw(placed(side, storage, shape))
                scale_at = None
                if scales and info.encoding is Encoding.BLOCKWISE:
                    blocks = tuple(-(-n // BLOCK) for n in shape)
                    scale_at = draw(placed(side, storage + ".scale_inv", blocks))
                side.ranks[rank].append(Box(info.name, start, shape, at, scale_at))
    return side


@st.composite
def plain_infos(draw: st.DrawFn, dtype: str = "bfloat16") -> list[TensorInfo]:
    shapes = draw(st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=3))
    return [TensorInfo(f"t{n}", tuple(shape), dtype) for n, shape in enumerate(shapes)]


@st.composite
def blockwise_infos(draw: st.DrawFn, limit: int = 2) -> list[TensorInfo]:
    count = draw(st.integers(1, limit))
    return [
        TensorInfo(
            f"w{n}.weight",
            (draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS))),
            "float8_e4m3fn",
            Encoding.BLOCKWISE,
            draw(st.sampled_from(Formula)),
        )
        for n in range(count)
    ]


def as_source(infos: Sequence[TensorInfo], dtype: str = "bfloat16") -> list[TensorInfo]:
    """The same tensors as a trainer holds them: plain."""
    return [TensorInfo(info.name, info.shape, dtype) for info in infos]


# --- brute force ----------------------------------------------------------------------------------


def window(storage: np.ndarray, at: Placement, shape: Sequence[int]) -> np.ndarray:
    """The rectangle of a flat storage that a placement shows; writable."""
    strides = tuple(s * storage.itemsize for s in at.strides)
    return np.lib.stride_tricks.as_strided(storage[at.offset :], tuple(shape), strides)


def element_ids(infos: Sequence[TensorInfo]) -> dict[str, np.ndarray]:
    """A number of its own for every element of every tensor."""
    ids, first = {}, 0
    for info in infos:
        ids[info.name] = np.arange(first, first + info.numel).reshape(info.shape)
        first += info.numel
    return ids


def part_of(array: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    return array[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def filled(side: Side, ids: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The side's storages with element numbers where boxes lie, -1 elsewhere."""
    storages = {name: np.full(size, -1, dtype=np.int64) for name, size in side.sizes.items()}
    for box in boxes(side):
        target = window(storages[box.at.storage], box.at, box.shape)
        target[...] = part_of(ids[box.tensor], box.start, box.shape)
    return storages


def boxes(side: Side) -> Iterator[Box]:
    for held in side.ranks.values():
        yield from held


def carry_out(
    copies: Sequence[Copy], source: dict[str, np.ndarray], sizes: dict[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Do what the copies say; return the storages and how often each element was written."""
    storages = {name: np.full(size, -1, dtype=np.int64) for name, size in sizes.items()}
    writes = {name: np.zeros(size, dtype=np.int64) for name, size in sizes.items()}
    for copy in copies:
        read = window(source[copy.source_at.storage], copy.source_at, copy.shape)
        window(storages[copy.at.storage], copy.at, copy.shape)[...] = read
        window(writes[copy.at.storage], copy.at, copy.shape)[...] += 1
    return storages, writes


# --- real tensors ---------------------------------------------------------------------------------


def tensor_window(storage: torch.Tensor, at: Placement, shape: Sequence[int]) -> torch.Tensor:
    return storage.as_strided(tuple(shape), at.strides, storage.storage_offset() + at.offset)


def cut(tensor: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def held_by(side: Side, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The side's storages, NaN outside its boxes, so that a stray read is seen."""
    dtype = next(iter(tensors.values())).dtype
    storages = {n: torch.full((size,), torch.nan, dtype=dtype) for n, size in side.sizes.items()}
    for box in boxes(side):
        whole = cut(tensors[box.tensor], box.start, box.shape)
        tensor_window(storages[box.at.storage], box.at, box.shape).copy_(whole)
    return storages


def random_tensors(infos: Sequence[TensorInfo], seed: int) -> dict[str, torch.Tensor]:
    """BF16 values over many binades, with a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for info in infos:
        x = torch.randn(info.shape, generator=generator)
        x = x * torch.exp2(torch.randint(-12, 6, info.shape, generator=generator))
        x.view(-1)[: min(7, x.numel())] = 0.0
        tensors[info.name] = x.to(torch.bfloat16)
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, for comparisons that take NaN and -0.0 seriously."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return flat.copy_(tensor.reshape(-1)).view(torch.uint8)
