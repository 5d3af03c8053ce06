"""FSDP2 and DTensor modules: each rank lists what its local shards hold, nothing is gathered.

A parameter's mesh and placements say which indices of each dim a rank holds; what the placements
promise is compared with the local tensor's shape before anything is believed.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import ITEMSIZE, Box, Manifest, Placement, TensorInfo
from fp8sync.plan.boxes import overlap
from fp8sync.sources.places import LazyTensors, ModuleState
from fp8sync.sources.stacks import hf_parts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fp8sync.plan.boxes import Rect

__all__ = ["DTensorSource", "holds_dtensors", "local_intervals"]

Interval = tuple[int, int]
"""(first index, length) along one dim of the whole tensor."""


def holds_dtensors(module: torch.nn.Module) -> bool:
    """Whether any parameter of `module` is distributed, as its `state_dict` shows it.

    FSDP2 may leave whole parameters in the module after a forward pass; `state_dict` reshards.
    """
    return any(isinstance(value, DTensor) for value in module.state_dict(keep_vars=True).values())


class DTensorSource:
    """A module whose parameters are DTensors (FSDP2, HSDP, tensor parallelism, or several at once).

    Parameters and persistent buffers are listed under their `state_dict` names. Plain tensors among
    them count as whole copies on every rank. Tied parameters are listed once, expert stacks per
    expert, as for `ModuleSource`.

    Args:
        module: sharded by `fully_shard`, `parallelize_module` or `distribute_tensor`.
        rank: this trainer rank.

    Examples:
        >>> source = DTensorSource(fully_shard(model), dist.get_rank())  # doctest: +SKIP
        >>> fp8sync.refit(source, llm)  # or the model itself  # doctest: +SKIP
    """

    def __init__(self, module: torch.nn.Module, rank: int) -> None:
        self._state, self._rank = ModuleState(module, id), rank

    def storages(self) -> Mapping[str, torch.Tensor]:
        """Return this rank's live local tensors by name; nothing is copied or gathered.

        Raises:
            TensorMismatch: parameters that were tied in the last manifest are not any more.
        """
        held = self._state.read()
        return LazyTensors(held.keys(), lambda name: {name: _local(held[name])})

    def manifest(self) -> Manifest:
        """Return this rank's boxes, and the infos of all tensors.

        Raises:
            UnsupportedLayout: a placement that is not a shard or a replica, a local tensor of another
                shape than its placements say, or a dtype that cannot travel; all of them at once.
        """
        infos: list[TensorInfo] = []
        boxes: list[Box] = []
        faults: list[str] = []
        values = self._state.walk()
        shapes = {name: value.shape for name, value in values.items()}
        for name, value in values.items():
            local = _local(value)
            fault, intervals = self._intervals(value)
            dtype = str(local.dtype).removeprefix("torch.")
            if dtype not in ITEMSIZE:
                fault = f"dtype {dtype} cannot travel"
            elif local.is_meta:
                fault = "expected data, found a meta tensor"
            try:
                parts = list(hf_parts(name, shapes))
            except ValueError as error:
                fault = fault or str(error)
            if fault:
                faults.append(f"{name} (trainer rank {self._rank}): {fault}")
                continue
            for part in parts:
                infos.append(TensorInfo(part.name, part.shape, dtype))
                for rect, first in _shards(intervals, local.stride(), part.rect):
                    start = tuple(rect[0][d] - part.rect[0][d] for d in part.dims)
                    shape = tuple(rect[1][d] for d in part.dims)
                    at = Placement(name, first, tuple(local.stride(d) for d in part.dims))
                    boxes.append(Box(part.name, start, shape, at))
        if faults:
            raise UnsupportedLayout("the module's shards cannot be read where they lie", faults)
        return Manifest.of(infos, {self._rank: boxes})

    def _intervals(self, value: torch.Tensor) -> tuple[str, list[list[Interval]]]:
        """Return (fault, indices held by dim); no indices where this rank is not in the mesh."""
        if not isinstance(value, DTensor):
            if type(value) not in (torch.Tensor, torch.nn.Parameter):
                return f"expected a plain tensor or a DTensor, found {type(value).__name__}", []
            return "", [[(0, n)] for n in value.shape]
        mesh = value.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            return "", [[] for _ in value.shape]
        try:
            intervals = local_intervals(value.shape, mesh.shape, value.placements, coordinate)
        except UnsupportedLayout as error:
            return error.summary, []
        promised = tuple(sum(n for _, n in dim) for dim in intervals)
        found = tuple(value.to_local().shape)
        if promised != found:
            return f"its placements {value.placements} promise {promised}, found {found}", []
        return "", intervals


def local_intervals(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[object],
    coordinate: Sequence[int],
) -> list[list[Interval]]:
    """Return which indices of each dim a rank holds, in the order of its local tensor.

    Shards are cut as `torch.chunk` cuts, so the last ones may be smaller or empty. FSDP2 over tensor
    parallelism (`_StridedShard`) cuts each tensor-parallel shard instead of the whole.

    Args:
        shape: of the whole tensor.
        mesh_shape: ranks along each axis of the mesh.
        placements: one for each axis.
        coordinate: the rank's, one for each axis.

    Raises:
        UnsupportedLayout: a placement that is neither a shard nor a replica.
    """
    held: list[list[Interval]] = [[(0, n)] for n in shape]
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, (Shard, _StridedShard)):
            raise UnsupportedLayout(
                f"placement {placement} on mesh axis {axis} is neither a shard nor a replica"
            )
        dim = placement.dim % len(held)
        pieces = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        held[dim] = [
            interval
            for piece in _chunks(held[dim], pieces)
            for interval in _chunks(piece, mesh_shape[axis])[coordinate[axis]]
        ]
    return held


def _chunks(intervals: Sequence[Interval], parts: int) -> list[list[Interval]]:
    """Cut a list of intervals into `parts` as `torch.chunk` cuts a tensor of their joint length."""
    total = sum(n for _, n in intervals)
    step = -(-total // parts)
    return [_slice(intervals, i * step, (i + 1) * step) for i in range(parts)]


def _slice(intervals: Sequence[Interval], low: int, high: int) -> list[Interval]:
    found = []
    position = 0
    for first, length in intervals:
        a, b = max(low, position), min(high, position + length)
        if a < b:
            found.append((first + a - position, b - a))
        position += length
    return found


def _shards(
    intervals: Sequence[Sequence[Interval]], strides: Sequence[int], wanted: Rect
) -> Iterator[tuple[Rect, int]]:
    """Yield (rectangle of the whole parameter, element offset in the local tensor) within `wanted`."""
    dims = []
    for dim in intervals:
        position, placed = 0, []
        for first, length in dim:
            placed.append((first, length, position))
            position += length
        dims.append(placed)
    for cell in product(*dims):
        rect = tuple(a for a, _, _ in cell), tuple(n for _, n, _ in cell)
        common = overlap(rect, wanted)
        if common is not None:
            index = (p + c - a for (a, _, p), c in zip(cell, common[0], strict=True))
            yield common, sum(i * s for i, s in zip(index, strides, strict=True))


def _local(value: torch.Tensor) -> torch.Tensor:
    # `to_local` makes a new tensor of what it wraps, at several times the price of all else.
    return value._local_tensor if isinstance(value, DTensor) else value
