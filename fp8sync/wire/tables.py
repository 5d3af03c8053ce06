"""The plan as descriptor tables: what the grouped kernels write, and what they check.

A copy's digest covers its elements row after row and, from the next multiple of 16 bytes, its scale_inv:
the same bytes as its part in a bucket. Slot i of a table is the i-th copy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import ITEMSIZE, Placement
from fp8sync.plan.boxes import contiguous, touched_blocks
from fp8sync.plan.bucket import ALIGN
from fp8sync.plan.pieces import Piece, pieces
from fp8sync.recipe import BLOCK, Encoding
from fp8sync_kernels import Job, Matrix, Part, Table, build_table, job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from fp8sync.plan import AmaxGroup, Bucket, Copy
    from fp8sync.plan import Part as BucketPart
    from fp8sync.wire.payload import Amax

__all__ = [
    "PlacedBucket",
    "check_table",
    "decoded",
    "matrix",
    "moved",
    "pack_table",
    "unpack_table",
    "unwritable",
    "write_table",
]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def unwritable(copies: Iterable[Copy], *, in_buckets: bool = False) -> str:
    """Return why a launch cannot write these copies, or an empty string.

    Args:
        copies: any.
        in_buckets: whether they are packed and unpacked, and not written straight to where they belong.
    """
    for copy in copies:
        if decoded(copy) and not in_buckets:
            return f"the engine keeps no scales of {copy.tensor}, and no launch dequantizes"
        if decoded(copy) and any(copy.origin):
            return f"the engine dequantizes {copy.tensor}, of which a copy begins inside a block"
        if copy.source_origin:
            return f"{copy.tensor} is an FP8 pair that is dequantized first"
        for at in (copy.source_at, copy.at):
            if copy.shape and copy.shape[-1] > 1 and at.strides[-1] != 1:
                return f"{copy.tensor} is not stored row by row"
    return ""


def decoded(copy: Copy) -> bool:
    """Whether the engine keeps no scales of a copy, but the values that codes and scales stand for."""
    return copy.encoding is Encoding.BLOCKWISE and copy.scale_at is None


def write_table(
    copies: Sequence[Copy],
    source: Callable[[str], tuple[int, str]],
    destination: Callable[[int, str], int],
    device: torch.device,
    amax: Amax | None = None,
) -> Table:
    """Quantize, cast or copy every source rectangle to its destination.

    Args:
        copies: of one source rank; slot i is copies[i].
        source: address and dtype of a source storage.
        destination: address of an engine rank's storage, as `device` sees it.
        device: that launches.
        amax: of blocks that are cut, on that device; read at each launch.

    Raises:
        UnsupportedLayout: see `unwritable`.
    """
    _require(unwritable(copies))
    jobs: list[Job] = []
    for slot, copy in enumerate(copies):
        there = partial(destination, copy.destination_rank)
        jobs += _written(copy, Part(slot), source, there, amax or {})
    return build_table(jobs, device)


@dataclass(frozen=True, slots=True)
class PlacedBucket:
    """A bucket whose payload lies at `address`; the digest of its i-th part goes to slots.start + i."""

    bucket: Bucket
    address: int
    slots: slice

    def parts(self) -> Iterator[tuple[BucketPart, Part]]:
        """Yield the bucket's parts, and where each enters the payload's digest."""
        for slot, part in enumerate(self.bucket.parts, self.slots.start):
            yield part, Part(slot, part.offset)


def pack_table(
    buckets: Sequence[PlacedBucket],
    source: Callable[[str], tuple[int, str]],
    zeros: torch.Tensor,
    amax: Amax,
) -> Table:
    """Quantize, cast or copy source rectangles into buckets.

    The digests of a bucket's slots add up to its payload's.

    Args:
        buckets: of one source rank.
        source: address and dtype of a source storage.
        zeros: uint8 [16], zero, of the device that launches; kept as long as the table.
        amax: see `write_table`.

    Raises:
        UnsupportedLayout: see `unwritable`.
    """
    parts = (part for placed in buckets for part in placed.bucket.parts)
    _require(unwritable((part.copy for part in parts), in_buckets=True))
    jobs: list[Job] = []
    for placed in buckets:
        for part, where in placed.parts():
            at, scale_at = _in_message(part)
            copy = replace(part.copy, at=at, scale_at=scale_at)
            jobs += _written(copy, where, source, lambda _, p=placed: p.address, amax)  # type: ignore[misc]
            for start, end in part.padding:
                gap = Matrix(placed.address + start, 1, end - start, end - start, torch.uint8)
                jobs.append(job.copy(zeros[: end - start], gap, Part(where.slot, start)))
    return build_table(jobs, zeros.device)


def unpack_table(
    buckets: Sequence[PlacedBucket], destination: Callable[[str], int], device: torch.device
) -> Table:
    """Copy the parts of buckets to where the engine wants them; digests as for `pack_table`.

    Parts that are `decoded` are only digested.
    """
    jobs: list[Job] = []
    for placed in buckets:
        for part, where in placed.parts():
            copy = part.copy
            at, scale_at = _in_message(part)
            target = None if decoded(copy) else destination(copy.at.storage)
            for index, plane in _planes(copy, where):
                x = matrix(placed.address, at.at(index), copy.shape, copy.dtype)
                out = None
                if target is not None:
                    out = matrix(target, copy.at.at(index), copy.shape, copy.dtype)
                jobs.append(job.copy(x, out, plane))
            if scale_at is None:
                continue
            scales = None
            if copy.scale_at is not None:
                scales = _scales(copy, destination(copy.scale_at.storage), copy.scale_at)
            sent = _scales(copy, placed.address, scale_at)
            jobs.append(job.copy(sent, scales, Part(where.slot, part.scale_offset)))
    return build_table(jobs, device)


def _in_message(part: BucketPart) -> tuple[Placement, Placement | None]:
    """Where a part's elements and scales lie, in a storage that is the payload itself."""
    copy = part.copy
    at = Placement("", part.offset // ITEMSIZE[copy.dtype], contiguous(copy.shape))
    if part.scale_offset < 0:
        return at, None
    return at, Placement("", part.scale_offset // 4, contiguous(copy.scale_shape))


def _written(
    copy: Copy,
    where: Part,
    source: Callable[[str], tuple[int, str]],
    destination: Callable[[str], int],
    amax: Amax,
) -> Iterator[Job]:
    base, dtype = source(copy.source_at.storage)
    target = destination(copy.at.storage)
    for index, part in _planes(copy, where):
        x = matrix(base, copy.source_at.at(index), copy.shape, dtype)
        out = matrix(target, copy.at.at(index), copy.shape, copy.dtype)
        yield from _write(copy, x, out, part, source, destination, amax)


def check_table(
    copies: Sequence[Copy], destination: Callable[[str], int], device: torch.device
) -> Table:
    """Digest what lies at the copies' destinations; writes nothing."""
    jobs: list[Job] = []
    for slot, copy in enumerate(copies):
        target = destination(copy.at.storage)
        for index, part in _planes(copy, Part(slot)):
            out = matrix(target, copy.at.at(index), copy.shape, copy.dtype)
            jobs.append(job.copy(out, None, part))
        if copy.scale_at is not None:
            scales = _scales(copy, destination(copy.scale_at.storage), copy.scale_at)
            jobs.append(job.copy(scales, None, Part(slot, _scale_base(copy))))
    return build_table(jobs, device)


def _require(reason: str) -> None:
    if reason:
        raise UnsupportedLayout(f"the grouped kernels cannot write this: {reason}")


def _write(
    copy: Copy,
    x: Matrix,
    out: Matrix,
    part: Part,
    source: Callable[[str], tuple[int, str]],
    destination: Callable[[str], int],
    amax: Amax,
) -> Iterator[Job]:
    if copy.scale_at is None:
        yield moved(x, out, part)
        return
    scale_base = destination(copy.scale_at.storage)
    if copy.source_scale_at is not None:
        scales = _scales(copy, scale_base, copy.scale_at)
        held = _scales(copy, source(copy.source_scale_at.storage)[0], copy.source_scale_at)
        yield moved(x, out, part)
        yield moved(held, scales, Part(part.slot, part.base + _scale_base(copy)))
        return
    given = amax.get(copy.tensor, ())
    for piece in pieces(copy, [group for group, _ in given]):
        yield _quantize(copy, piece, x, out, part, scale_base, given)


def moved(x: Matrix, out: Matrix, part: Part) -> Job:
    """Return the job that sends what stays as it is.

    Nothing is sent that is not examined: a cast to the same dtype counts NaN and Inf, a copy does not.
    """
    if x.dtype in _FLOATS and out.dtype in _FLOATS:
        return job.cast(x, out, part)
    fp8 = x.dtype == torch.float8_e4m3fn
    return job.copy_codes(x, out, part) if fp8 else job.copy(x, out, part)


def _quantize(
    copy: Copy,
    piece: Piece,
    x: Matrix,
    out: Matrix,
    where: Part,
    scale_base: int,
    given: Sequence[tuple[AmaxGroup, torch.Tensor]],
) -> Job:
    if copy.formula is None or copy.scale_at is None:
        raise ValueError(f"{copy.tensor}: a blockwise copy without a formula or scales")
    index = [a - b for a, b in zip(piece.rect[0], copy.start, strict=True)]
    blocks = touched_blocks(piece.rect)
    first, (_, across) = copy.scale_rect
    begin = [a - b for a, b in zip(blocks[0], first, strict=True)]
    part = Part(
        where.slot,
        where.base + index[0] * copy.shape[1] + index[1],
        copy.shape[1],
        where.base + _scale_base(copy) + 4 * (begin[0] * across + begin[1]),
        4 * across,
    )
    scales = joint = None
    if piece.carries:
        scales = matrix(scale_base, copy.scale_at.at(begin), blocks[1], "float32")
    if piece.given is not None:
        group, values = given[piece.given]
        within = [a - b for a, b in zip(blocks[0], group.start, strict=True)]
        at = Placement("", 0, (group.shape[1], 1)).at(within)
        joint = matrix(values.data_ptr(), at, blocks[1], "float32")
    row, col = (a % BLOCK for a in piece.rect[0])
    return job.quantize(
        _inner(x, index, piece.rect[1]),
        copy.formula.value,
        _inner(out, index, piece.rect[1]),
        scales,
        part,
        amax=joint,
        origin=(row, col),
    )


def _inner(whole: Matrix, index: Sequence[int], shape: Sequence[int]) -> Matrix:
    """The rectangle of `shape` that begins at `index` of a matrix."""
    if (whole.rows, whole.cols) == tuple(shape):
        return whole
    first = (index[0] * whole.stride + index[1]) * whole.itemsize
    return replace(whole, address=whole.address + first, rows=shape[0], cols=shape[1])


def _planes(copy: Copy, where: Part) -> Iterator[tuple[tuple[int, ...], Part]]:
    """Yield the start of every 2-D plane of a copy, and its place in a digest that begins at `where`."""
    lead = copy.shape[:-2]
    zeros = (0,) * (len(copy.shape) - len(lead))
    rows, cols = _two_dims(copy.shape)
    for number, index in enumerate(product(*map(range, lead))):
        start = where.base + number * rows * cols * ITEMSIZE[copy.dtype]
        yield (*index, *zeros), Part(where.slot, start)


def _two_dims(shape: Sequence[int]) -> tuple[int, int]:
    padded = (1, 1, *shape)
    return padded[-2], padded[-1]


def matrix(base: int, at: Placement, shape: Sequence[int], dtype: str) -> Matrix:
    """The rectangle of `shape` (its last two dims) at a placement of the storage at address `base`."""
    rows, cols = _two_dims(shape)
    stride = at.strides[-2] if len(shape) > 1 and rows > 1 else cols
    address = base + at.offset * ITEMSIZE[dtype]
    return Matrix(address, rows, cols, stride, getattr(torch, dtype))


def _scales(copy: Copy, base: int, at: Placement) -> Matrix:
    return matrix(base, at, copy.scale_shape, "float32")


def _scale_base(copy: Copy) -> int:
    return -(-copy.weight_bytes // ALIGN) * ALIGN
