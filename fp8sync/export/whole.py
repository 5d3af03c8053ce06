"""Whole tensors from boxes: every rank packs what it holds, rank 0 gets them band by band.

A band is a run of rows of one HF tensor. The plan is that of a refit whose engine is one rank that
wants every tensor in bands, also what takes the misc path elsewhere; nobody holds more than one of them
at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from fp8sync.export.ranks import Attempts, agree, receive, send
from fp8sync.manifest import ITEMSIZE, Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan, fill_buckets
from fp8sync.plan.boxes import block_shape
from fp8sync.plan.formats import MISC, cut_pairs
from fp8sync.plan.merge import merge_ranks
from fp8sync.recipe import BLOCK, Encoding
from fp8sync.sources.live import LiveSource
from fp8sync.trainers import rank_and_size
from fp8sync.wire.payload import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp8sync.plan import Bucket, Copy
    from fp8sync.sources import Source
    from fp8sync.wire.payload import Storages

__all__ = ["Band", "WholeTensors"]

_SCALES = "/scale_inv"


class Band(NamedTuple):
    """Rows of an HF tensor from `first` on, as the trainer holds them: elements, or codes and scales.

    Of an FP8 pair whose blocks are not the tensor's, the values in float32.
    """

    tensor: str
    first: int
    weight: torch.Tensor
    scale_inv: torch.Tensor | None
    ranks: tuple[int, ...]

    @property
    def held_by(self) -> str:
        """The tensor's name, and the trainer ranks that sent these rows."""
        ranks = ", ".join(str(rank) for rank in self.ranks)
        return f"{self.tensor} (trainer rank{'s' if len(self.ranks) > 1 else ''} {ranks})"


@dataclass(frozen=True, slots=True)
class _Rows:
    """A band before it is made."""

    info: TensorInfo
    first: int
    shape: tuple[int, ...]

    @property
    def storage(self) -> str:
        return f"{MISC}{self.info.name}/{self.first}"  # so called, it is not carried to a whole one

    @property
    def has_scales(self) -> bool:
        return self.info.encoding is Encoding.BLOCKWISE

    def box(self) -> Box:
        start = (self.first, *(0 for _ in self.shape[1:])) if self.shape else ()
        at, scale_at = _whole(self.storage, self.shape), None
        if self.has_scales:
            scale_at = _whole(self.storage + _SCALES, block_shape(self.shape))
        return Box(self.info.name, start, self.shape, at, scale_at)

    def empty(self, device: torch.device) -> dict[str, torch.Tensor]:
        dtype = getattr(torch, self.info.dtype)
        found = {self.storage: torch.zeros(self.shape, dtype=dtype, device=device)}
        if self.has_scales:
            scales = torch.zeros(block_shape(self.shape), dtype=torch.float32, device=device)
            found[self.storage + _SCALES] = scales
        return found


class WholeTensors:
    """All tensors of a source, whole. Every trainer rank makes one at the same time.

    Args:
        source: this rank's weights.
        band_bytes: size of a band, unless 128 rows of a matrix (one, of anything else) are larger.

    Raises:
        Fp8SyncError: on all ranks, what stopped any of them.
    """

    def __init__(self, source: Source, band_bytes: int) -> None:
        self._source, self._band_bytes = LiveSource(lambda: source), band_bytes
        self._rank = rank_and_size()[0]
        self._source.prepare()
        told = agree(lambda: self._source.manifest().to_json())
        held = merge_ranks([Manifest.from_json(manifest) for manifest in told])
        self._source.check(held)
        self.tensors = held.tensors
        cut = cut_pairs(held)
        infos = [_values(i) if n in cut else i for n, i in held.tensors.items()]
        self._bands = [rows for info in infos for rows in _rows(info, band_bytes)]
        wanted = Manifest.of(infos, {0: [rows.box() for rows in self._bands]})
        self._copies: dict[str, list[Copy]] = defaultdict(list)
        for copy in build_plan(held, wanted, requantize=True).copies:
            self._copies[copy.at.storage].append(copy)

    def stream(self, take: Callable[[Band], None]) -> None:
        """Carry every band to rank 0, tensor by tensor, where `take` is called with it; once.

        Raises:
            Fp8SyncError: on all ranks, what stopped any of them.
        """
        attempt = Attempts()
        live: dict[str, torch.Tensor] = {}
        attempt(lambda: live.update(self._source.storages()))
        for rows in self._bands:
            made = rows.empty(_device(live)) if self._rank == 0 else {}
            for bucket in fill_buckets(self._copies[rows.storage], self._band_bytes):
                self._carry(bucket, live, made, attempt)
            if self._rank == 0:
                scale_inv = made.get(rows.storage + _SCALES)
                ranks = tuple(sorted({c.source_rank for c in self._copies[rows.storage]}))
                band = Band(rows.info.name, rows.first, made[rows.storage], scale_inv, ranks)
                attempt(partial(take, band))
        self._source.release()
        attempt.settle()

    def _carry(self, bucket: Bucket, live: Storages, made: Storages, attempt: Attempts) -> None:
        payload = torch.zeros(bucket.nbytes, dtype=torch.uint8, device=_device(live))
        if bucket.source_rank == self._rank:
            attempt(lambda: pack(bucket, live, payload))
            if self._rank:
                send(payload, 0)
        elif self._rank == 0:
            payload = receive(bucket.nbytes, bucket.source_rank)
        if self._rank == 0:
            attempt(lambda: unpack(bucket, payload, made))


def _values(info: TensorInfo) -> TensorInfo:
    """How a pair is carried whose blocks, or boxes, are not the tensor's."""
    return TensorInfo(info.name, info.shape, "float32")


def _rows(info: TensorInfo, band_bytes: int) -> Iterator[_Rows]:
    if not info.shape:
        yield _Rows(info, 0, ())
        return
    row_bytes = math.prod(info.shape[1:]) * ITEMSIZE[info.dtype]
    unit = BLOCK if len(info.shape) == 2 else 1
    step = max(unit, band_bytes // max(row_bytes, 1) // unit * unit)
    for first in range(0, info.shape[0], step):
        yield _Rows(info, first, (min(step, info.shape[0] - first), *info.shape[1:]))


def _device(live: Storages) -> torch.device:
    return next((tensor.device for tensor in live.values()), torch.device("cpu"))


def _whole(storage: str, shape: tuple[int, ...]) -> Placement:
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return Placement(storage, 0, tuple(strides))
