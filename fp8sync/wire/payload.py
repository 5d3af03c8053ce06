"""Between tensors and buckets: pack on the source's device, unpack into the engine's staging memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import NonFiniteWeight
from fp8sync.manifest import ITEMSIZE, Placement
from fp8sync.plan import Part, strips
from fp8sync.plan.boxes import Rect, overlap, touched_blocks
from fp8sync.recipe import BLOCK, Encoding
from fp8sync_kernels import dequantize_blockwise, partial_amax, quantize_blockwise

if TYPE_CHECKING:
    from fp8sync.plan import AmaxGroup, Bucket, Copy

__all__ = ["Amax", "PartReport", "Storages", "dequantized", "infinite_in", "pack", "unpack", "view"]

STRIP_BYTES = 1 << 22
"""Larger parts are packed and unpacked in strips: in float32, a part takes many times its bytes."""

Storages = Mapping[str, torch.Tensor]
"""Local storages by name; placements index their elements from the storage's first."""


@dataclass(frozen=True, slots=True)
class PartReport:
    """What quantizing one part showed.

    `nonfinite` counts NaN and Inf among the elements sent, and among scales that are passed through;
    `error_sq` and `norm_sq` are the sums of squares of the quantization error and of the source, for
    the relative Frobenius error.
    """

    tensor: str
    nonfinite: int
    error_sq: float = 0.0
    norm_sq: float = 0.0


def view(storages: Storages, at: Placement, shape: Sequence[int]) -> torch.Tensor:
    """Return the strided rectangle of `shape` at a placement; shares memory with the storage, detached."""
    base = storages[at.storage].detach()
    return base.as_strided(tuple(shape), at.strides, base.storage_offset() + at.offset)


Amax = Mapping[str, Sequence[tuple["AmaxGroup", torch.Tensor]]]
"""By tensor, the groups of cut blocks that this rank takes part in, with the amax agreed on."""


@torch.no_grad()
def pack(
    bucket: Bucket, storages: Storages, payload: torch.Tensor, amax: Amax | None = None
) -> list[PartReport]:
    """Write a bucket's parts: quantize blockwise ones, pass FP8 pairs through.

    Args:
        bucket: what goes where.
        storages: the source rank's storages, any float dtype, one device.
        payload: uint8 [bucket.nbytes] on the same device, zeroed where no part lies.
        amax: for copies that are cut inside a block.
    """
    parts = (strip for whole in bucket.parts for strip in _strips(whole))
    return [_pack_part(part, storages, payload, amax or {}) for part in parts]


def _strips(part: Part) -> Iterator[Part]:
    """Yield a part in strips, which follow each other in the payload as they do in the part."""
    offset, scale_offset = part.offset, part.scale_offset
    for copy in strips([part.copy], STRIP_BYTES):
        yield Part(copy, offset, scale_offset)
        offset += copy.weight_bytes
        scale_offset += copy.scale_bytes


def _pack_part(part: Part, storages: Storages, payload: torch.Tensor, amax: Amax) -> PartReport:
    copy = part.copy
    x = view(storages, copy.source_at, copy.shape)
    out = _elements(payload, part.offset, copy.shape, copy.dtype)
    anew = copy.source_scale_at is not None and bool(copy.source_origin)
    if anew:
        x = _held_values(copy, x, storages)
    if copy.encoding is Encoding.PLAIN:
        out.copy_(x)
        bad = int((~torch.isfinite(out.float())).sum()) if out.is_floating_point() else 0
        return PartReport(copy.tensor, bad)
    scales = _elements(payload, part.scale_offset, copy.scale_shape, "float32")
    if copy.source_scale_at is not None and not anew:
        out.copy_(x)
        scales.copy_(view(storages, copy.source_scale_at, copy.scale_shape))
        found = (~torch.isfinite(out.float())).sum() + (~torch.isfinite(scales)).sum()
        return PartReport(copy.tensor, int(found))
    if copy.formula is None:
        raise ValueError(f"{copy.tensor}: a blockwise copy without a formula")
    given = _whole_amax(copy, x, amax)
    q = quantize_blockwise(x, copy.formula.value, amax=given, origin=_origin(copy.start))
    out.copy_(q.weight)
    first = touched_blocks(copy.rect)[0]
    scales.copy_(_cut(q.scale_inv, first, copy.scale_rect))
    exact = x.float()
    error = dequantized(q.weight, q.scale_inv, copy.origin, torch.float32) - exact
    sums = torch.stack([error.square().sum(), exact.square().sum()])
    squares = torch.nan_to_num(sums, posinf=0.0).tolist()
    return PartReport(copy.tensor, int(q.nonfinite), *squares)


@torch.no_grad()
def unpack(bucket: Bucket, payload: torch.Tensor, staging: Storages) -> None:
    """Copy a bucket's parts to where the engine wants them.

    A blockwise part whose destination keeps no scales is dequantized: codes times scale_inv, rounded
    once to the storage's dtype.

    Raises:
        NonFiniteWeight: what is dequantized is too large for float16, the one dtype with less room than BF16;
            after all parts.
    """
    infinite: Counter[str] = Counter()
    for part in (strip for whole in bucket.parts for strip in _strips(whole)):
        copy = part.copy
        codes = _elements(payload, part.offset, copy.shape, copy.dtype)
        destination = view(staging, copy.at, copy.shape)
        if copy.encoding is Encoding.PLAIN:
            destination.copy_(codes)
            continue
        scales = _elements(payload, part.scale_offset, copy.scale_shape, "float32")
        if copy.scale_at is None:
            values = dequantized(codes, scales, copy.origin, destination.dtype)
            if values.dtype == torch.float16:
                infinite[copy.tensor] += int((~values.isfinite()).sum())
            destination.copy_(values)
        else:
            destination.copy_(codes)
            view(staging, copy.scale_at, copy.scale_shape).copy_(scales)
    if infinite.total():
        raise infinite_in(torch.float16, infinite, bucket.destination_rank)


def infinite_in(dtype: torch.dtype, counts: Mapping[str, int], rank: int) -> NonFiniteWeight:
    """Return the error of an engine rank whose dtype is too small for what a trainer sent, by tensor."""
    name = str(dtype).removeprefix("torch.")
    faults = [
        f"{tensor} (engine rank {rank}): expected values that are finite in {name}, "
        f"found {count} NaN or Inf"
        for tensor, count in counts.items()
        if count
    ]
    return NonFiniteWeight("the trainer's weights are not finite in the engine", faults)


def _elements(payload: torch.Tensor, offset: int, shape: Sequence[int], dtype: str) -> torch.Tensor:
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    return payload[offset : offset + nbytes].view(getattr(torch, dtype)).view(tuple(shape))


def _whole_amax(copy: Copy, x: torch.Tensor, amax: Amax) -> torch.Tensor:
    """The amax of every block that a copy touches: its own, or what the block's holders agreed on."""
    own = partial_amax(x, origin=_origin(copy.start))
    touched = touched_blocks(copy.rect)
    for group, joint in amax.get(copy.tensor, ()):
        common = overlap(touched, (group.start, group.shape))
        if common is not None:
            _cut(own, touched[0], common).copy_(_cut(joint, group.start, common))
    return own


def _held_values(copy: Copy, codes: torch.Tensor, storages: Storages) -> torch.Tensor:
    """The values of a pair in blocks of the source's own, in float32."""
    if copy.source_scale_at is None:
        raise ValueError(f"{copy.tensor}: codes without scales")
    origin = copy.source_origin
    grid = [-(-(o + n) // BLOCK) for o, n in zip(origin, copy.shape, strict=True)]
    scales = view(storages, copy.source_scale_at, grid)
    return dequantized(codes, scales, origin, torch.float32)


def _origin(start: Sequence[int]) -> tuple[int, int]:
    row, col = (a % BLOCK for a in start)
    return row, col


def _cut(grid: torch.Tensor, first: Sequence[int], rect: Rect) -> torch.Tensor:
    """The part `rect` of a grid whose first cell is `first`; all in blocks of the whole tensor."""
    starts = (a - b for a, b in zip(rect[0], first, strict=True))
    return grid[tuple(slice(a, a + n) for a, n in zip(starts, rect[1], strict=True))]


def dequantized(
    codes: torch.Tensor, scale_inv: torch.Tensor, origin: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Return the values of a rectangle that may begin inside a block, rounded once to `dtype`.

    Args:
        codes: float8_e4m3fn [N, K].
        scale_inv: float32, of every block that the rectangle touches.
        origin: position of the first element within its block.
        dtype: of the values.
    """
    if not any(origin):
        return dequantize_blockwise(codes, scale_inv, dtype)
    whole = codes.new_zeros([a + n for a, n in zip(origin, codes.shape, strict=True)])
    inner = tuple(slice(a, None) for a in origin)
    whole[inner].copy_(codes)
    return dequantize_blockwise(whole, scale_inv, dtype)[inner]
