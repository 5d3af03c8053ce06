"""Between tensors and buckets: pack on the source's device, unpack into the engine's staging memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8sync.manifest import ITEMSIZE, Placement
from fp8sync.recipe import Encoding
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise

if TYPE_CHECKING:
    from fp8sync.plan import Bucket, Part

__all__ = ["PartReport", "Storages", "pack", "unpack", "view"]

Storages = Mapping[str, torch.Tensor]
"""Local storages by name; placements index their elements from the storage's first."""


@dataclass(frozen=True, slots=True)
class PartReport:
    """What quantizing one part showed.

    `nonfinite` counts NaN and Inf among the elements sent; `error_sq` and `norm_sq` are the sums of
    squares of the quantization error and of the source, for the relative Frobenius error.
    """

    tensor: str
    nonfinite: int
    error_sq: float = 0.0
    norm_sq: float = 0.0


def view(storages: Storages, at: Placement, shape: Sequence[int]) -> torch.Tensor:
    """Return the strided rectangle of `shape` at a placement; shares memory with the storage."""
    base = storages[at.storage]
    return base.as_strided(tuple(shape), at.strides, base.storage_offset() + at.offset)


@torch.no_grad()
def pack(bucket: Bucket, storages: Storages, payload: torch.Tensor) -> list[PartReport]:
    """Write a bucket's parts, quantizing the blockwise ones.

    Args:
        bucket: what goes where.
        storages: the source rank's storages, any float dtype, one device.
        payload: uint8 [bucket.nbytes] on the same device, zeroed where no part lies.
    """
    return [_pack_part(part, storages, payload) for part in bucket.parts]


def _pack_part(part: Part, storages: Storages, payload: torch.Tensor) -> PartReport:
    copy = part.copy
    x = view(storages, copy.source_at, copy.shape)
    out = _elements(payload, part.offset, copy.shape, copy.dtype)
    if copy.encoding is Encoding.PLAIN:
        out.copy_(x)
        bad = int((~torch.isfinite(out)).sum()) if out.is_floating_point() else 0
        return PartReport(copy.tensor, bad)
    if copy.formula is None:
        raise ValueError(f"{copy.tensor}: a blockwise copy without a formula")
    q = quantize_blockwise(x, copy.formula.value)
    out.copy_(q.weight)
    _elements(payload, part.scale_offset, copy.scale_shape, "float32").copy_(q.scale_inv)
    exact = x.float()
    error = dequantize_blockwise(q.weight, q.scale_inv, torch.float32) - exact
    sums = torch.stack([error.square().sum(), exact.square().sum()])
    squares = torch.nan_to_num(sums, posinf=0.0).tolist()
    return PartReport(copy.tensor, int(q.nonfinite), *squares)


@torch.no_grad()
def unpack(bucket: Bucket, payload: torch.Tensor, staging: Storages) -> None:
    """Copy a bucket's parts to where the engine wants them.

    A blockwise part whose destination keeps no scales is dequantized: codes times scale_inv, rounded
    once to the storage's dtype.
    """
    for part in bucket.parts:
        copy = part.copy
        codes = _elements(payload, part.offset, copy.shape, copy.dtype)
        destination = view(staging, copy.at, copy.shape)
        if copy.encoding is Encoding.PLAIN:
            destination.copy_(codes)
            continue
        scales = _elements(payload, part.scale_offset, copy.scale_shape, "float32")
        if copy.scale_at is None:
            destination.copy_(dequantize_blockwise(codes, scales, destination.dtype))
        else:
            destination.copy_(codes)
            view(staging, copy.scale_at, copy.scale_shape).copy_(scales)


def _elements(payload: torch.Tensor, offset: int, shape: Sequence[int], dtype: str) -> torch.Tensor:
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    return payload[offset : offset + nbytes].view(getattr(torch, dtype)).view(tuple(shape))
