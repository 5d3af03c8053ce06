"""Moves what the boxes say into whole tensors on rank 0, through the real plan, buckets and payload."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import MISC, build_plan, fill_buckets
from fp8sync.plan.boxes import block_shape
from fp8sync.recipe import BLOCK, Encoding, Formula
from fp8sync.wire.payload import pack, unpack, view

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8sync.plan import Plan
    from fp8sync.wire.payload import Storages

SCALES = ".scale_inv"


def destination(source: Manifest, formulas: Mapping[str, Formula]) -> Manifest:
    """One rank that wants whole tensors: blockwise where `formulas` names one, else as they are."""
    infos, boxes = [], []
    for name, info in source.tensors.items():
        zero, at = (0,) * len(info.shape), _whole(name, info.shape)
        formula = formulas.get(name)
        if formula is None:
            infos.append(TensorInfo(name, info.shape, info.dtype))
            boxes.append(Box(name, zero, info.shape, at))
            continue
        scale_at = _whole(name + SCALES, block_shape(info.shape))
        kind = "float8_e4m3fn", Encoding.BLOCKWISE, formula
        infos.append(TensorInfo(name, info.shape, *kind))
        boxes.append(Box(name, zero, info.shape, at, scale_at))
    return Manifest.of(infos, {0: boxes})


def transfer(source: Manifest, wanted: Manifest, live: Storages) -> dict[str, torch.Tensor]:
    """Carry out the plan over gloo; rank 0 returns what arrived, the others nothing."""
    plan = build_plan(source, wanted)
    staging = {}
    if dist.get_rank() == 0:
        misc = [i for i in plan.tensors.values() if i.misc]
        staging = _staging(wanted)
        staging |= {MISC + i.name: torch.zeros(i.shape, dtype=_dtype(i)) for i in misc}
    carry_out(plan, 0, live, staging)
    return staging


def carry_out(plan: Plan, engine_rank: int, live: Storages, staging: Storages) -> None:
    """Bring what one engine rank is sent into `staging`, which is on rank 0."""
    rank = dist.get_rank()
    for bucket in fill_buckets(plan.to_rank(engine_rank), 1 << 20):
        payload = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        if rank == bucket.source_rank:
            pack(bucket, live, payload)
            if rank:
                dist.send(payload, 0)
        if rank == 0:
            if bucket.source_rank:
                dist.recv(payload, bucket.source_rank)
            unpack(bucket, payload, staging)


def assemble(source: Manifest, live: Storages) -> dict[str, torch.Tensor]:
    """Read every box of every rank through its placements; rank 0 returns the whole tensors."""
    rank = dist.get_rank()
    own = []
    for box in source.ranks[rank]:
        scales = None
        if box.scale_at is not None:
            scales = _bytes(view(live, box.scale_at, block_shape(box.shape)))
        own.append((box, _bytes(view(live, box.at, box.shape)), scales))
    found: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(own, found if rank == 0 else None)
    made: dict[str, torch.Tensor] = {}
    seen: dict[Any, Any] = {}
    for box, elements, scales in (row for rows in found if rows for row in rows):
        replica = seen.setdefault((box.tensor, box.start, box.shape), (elements, scales))
        assert replica == (elements, scales), f"{box.tensor}: replicas differ"
        info = source.tensors[box.tensor]
        _put(made, box.tensor, info.shape, box.start, _tensor(elements, info.dtype, box.shape))
        if scales is not None:
            start = tuple(i // BLOCK for i in box.start)
            part = _tensor(scales, "float32", block_shape(box.shape))
            _put(made, box.tensor + SCALES, block_shape(info.shape), start, part)
    return made


def _put(made: dict, name: str, shape: Any, start: Any, part: torch.Tensor) -> None:
    whole = made.setdefault(name, torch.zeros(shape, dtype=part.dtype))
    whole[tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))] = part


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return flat.view(getattr(torch, dtype)).view(shape)


def _whole(storage: str, shape: tuple[int, ...]) -> Placement:
    return Placement(storage, 0, torch.empty(shape, device="meta").stride())


def _dtype(info: TensorInfo) -> torch.dtype:
    return getattr(torch, info.dtype)


def _staging(wanted: Manifest) -> dict[str, torch.Tensor]:
    made = {}
    for name, info in wanted.tensors.items():
        made[name] = torch.zeros(info.shape, dtype=_dtype(info))
        if info.encoding is Encoding.BLOCKWISE:
            made[name + SCALES] = torch.zeros(block_shape(info.shape))
    return made
