"""What a trainer rank holds, in the engine's format: each unit packed and unpacked by a refit's own code."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fp8sync.audit.ledger import Ledger
from fp8sync.audit.units import (
    Held,
    Unit,
    as_kv_scale,
    check_readable,
    is_kv_scale,
    units_of,
)
from fp8sync.manifest import Placement
from fp8sync.plan import Plan, fill_buckets
from fp8sync.recipe import Encoding
from fp8sync.wire.payload import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8sync.plan.copy import Copy
    from fp8sync.wire.payload import Amax, Storages

__all__ = ["trainer_ledger"]


def trainer_ledger(
    storages: Storages,
    amax: Amax,
    rank: int,
    plan: Plan,
    bucket_bytes: int,
    before: Mapping[str, torch.Tensor],
) -> Ledger:
    """Return the ledger of a trainer rank: its weights as they are now, in the engine's format.

    Args:
        storages: this rank's.
        amax: of the blocks that its boxes cut, agreed on by all their holders.
        rank: this rank among the trainer's.
        plan: of all ranks, or of this one.
        bucket_bytes: by which both sides take the plan apart.
        before: `scales` of this rank's ledger of the audit before.
    """
    ranks = sorted({copy.destination_rank for copy in plan.copies})
    units = [unit for r in ranks for unit in units_of(plan, r, bucket_bytes)]

    def read(unit: Unit) -> Held:
        check_readable(plan, unit)
        held = _as_it_arrives(unit.part.copy, plan, storages, amax)
        if is_kv_scale(plan.tensors[unit.part.copy.tensor]):
            return Held.of(as_kv_scale(held.weight, held.weight.dtype), None)
        return held

    return Ledger([u for u in units if u.part.copy.source_rank == rank], read, before)


@torch.no_grad()
def _as_it_arrives(copy: Copy, plan: Plan, storages: Storages, amax: Amax) -> Held:
    device = storages[copy.source_at.storage].device
    dtype = getattr(torch, copy.dtype)
    moved = replace(copy, at=_contiguous("weight", copy.shape))
    paired = copy.scale_at is not None and not plan.is_cut(copy)
    if paired:
        moved = replace(moved, scale_at=_contiguous("scale_inv", copy.scale_shape))
    elif copy.encoding is Encoding.BLOCKWISE:
        kept = "float32" if copy.scale_at is not None else plan.tensors[copy.tensor].dtype
        dtype = getattr(torch, kept)
        moved = replace(moved, scale_at=None)
    (bucket,) = fill_buckets([moved], sys.maxsize)
    payload = torch.zeros(bucket.nbytes, dtype=torch.uint8, device=device)
    staging = {"weight": torch.empty(copy.shape, dtype=dtype, device=device)}
    if paired:
        staging["scale_inv"] = torch.empty(copy.scale_shape, dtype=torch.float32, device=device)
    pack(bucket, storages, payload, amax)
    unpack(bucket, payload, staging)
    held = Held.of(staging["weight"], staging.get("scale_inv"))
    if copy.encoding is Encoding.PLAIN:
        return held
    if held.scale_inv is not None:
        return replace(held, made_of=(held.weight, held.scale_inv))
    codes = payload[: copy.weight_bytes].view(torch.float8_e4m3fn).view(copy.shape)
    scales = payload[bucket.parts[0].scale_offset :][: moved.scale_bytes].view(torch.float32)
    return replace(held, made_of=(codes, scales.view(moved.scale_shape)))


def _contiguous(storage: str, shape: tuple[int, ...]) -> Placement:
    strides = torch.empty(shape, dtype=torch.uint8, device="meta").stride()
    return Placement(storage, 0, tuple(strides))
