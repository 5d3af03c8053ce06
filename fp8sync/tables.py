"""The plan as descriptor tables: what the grouped kernels write, and what they check.

A copy's digest covers its elements row after row and, from the next multiple of 16 bytes, its scale_inv:
the same bytes as its part in a bucket. Slot i of a table is the i-th copy.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import ITEMSIZE, Placement
from fp8sync.plan.boxes import touched_blocks
from fp8sync.plan.bucket import ALIGN
from fp8sync.plan.pieces import Piece, pieces
from fp8sync.recipe import BLOCK, Encoding
from fp8sync_kernels import Job, Matrix, Part, Table, build_table, job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp8sync.payload import Amax
    from fp8sync.plan import AmaxGroup, Copy

__all__ = ["check_table", "matrix", "unwritable", "write_table"]

_COUNTED = (torch.bfloat16, torch.float16, torch.float32)


def unwritable(copies: Sequence[Copy]) -> str:
    """Return why these copies cannot be written one-sided, or an empty string."""
    for copy in copies:
        if copy.encoding is Encoding.BLOCKWISE and copy.scale_at is None:
            return "the engine dequantizes what it receives"
        for at in (copy.source_at, copy.at):
            if copy.shape and copy.shape[-1] > 1 and at.strides[-1] != 1:
                return f"{copy.tensor} is not stored row by row"
    return ""


def write_table(
    copies: Sequence[Copy],
    source: Callable[[str], tuple[int, str]],
    destination: Callable[[str], int],
    device: torch.device,
    amax: Amax | None = None,
) -> Table:
    """Quantize, cast or copy every source rectangle to its destination.

    Args:
        copies: of one source rank; slot i is copies[i].
        source: address and dtype of a source storage.
        destination: address of a destination storage, as `device` sees it.
        device: that launches.
        amax: of blocks that are cut, on that device; read at each launch.

    Raises:
        UnsupportedLayout: see `unwritable`.
    """
    reason = unwritable(copies)
    if reason:
        raise UnsupportedLayout(f"one-sided writing is not possible: {reason}")
    jobs: list[Job] = []
    for slot, copy in enumerate(copies):
        base, dtype = source(copy.source_at.storage)
        target = destination(copy.at.storage)
        for index, part in _planes(copy, slot):
            x = matrix(base, copy.source_at.at(index), copy.shape, dtype)
            out = matrix(target, copy.at.at(index), copy.shape, copy.dtype)
            jobs += _write(copy, x, out, part, source, destination, amax or {})
    return build_table(jobs, device)


def check_table(
    copies: Sequence[Copy], destination: Callable[[str], int], device: torch.device
) -> Table:
    """Digest what lies at the copies' destinations; writes nothing."""
    jobs: list[Job] = []
    for slot, copy in enumerate(copies):
        target = destination(copy.at.storage)
        for index, part in _planes(copy, slot):
            out = matrix(target, copy.at.at(index), copy.shape, copy.dtype)
            jobs.append(job.copy(out, None, part))
        if copy.scale_at is not None:
            scales = _scales(copy, destination(copy.scale_at.storage), copy.scale_at)
            jobs.append(job.copy(scales, None, Part(slot, _scale_base(copy))))
    return build_table(jobs, device)


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
        # A cast to the same dtype changes nothing, but unlike a copy it counts NaN and Inf.
        floats = x.dtype in _COUNTED and out.dtype in _COUNTED
        yield job.cast(x, out, part) if floats else job.copy(x, out, part)
        return
    scale_base = destination(copy.scale_at.storage)
    if copy.source_scale_at is not None:
        scales = _scales(copy, scale_base, copy.scale_at)
        held = _scales(copy, source(copy.source_scale_at.storage)[0], copy.source_scale_at)
        yield job.copy(x, out, part)
        yield job.copy(held, scales, Part(part.slot, _scale_base(copy)))
        return
    given = amax.get(copy.tensor, ())
    for piece in pieces(copy, [group for group, _ in given]):
        yield _quantize(copy, piece, x, out, part.slot, scale_base, given)


def _quantize(
    copy: Copy,
    piece: Piece,
    x: Matrix,
    out: Matrix,
    slot: int,
    scale_base: int,
    given: Sequence[tuple[AmaxGroup, torch.Tensor]],
) -> Job:
    if copy.formula is None or copy.scale_at is None:
        raise ValueError(f"{copy.tensor}: a blockwise copy without a formula or scales")
    index = [a - b for a, b in zip(piece.rect[0], copy.start, strict=True)]
    blocks = touched_blocks(piece.rect)
    across = copy.scale_shape[1]
    begin = [a - b for a, b in zip(blocks[0], copy.scale_rect[0], strict=True)]
    part = Part(
        slot,
        index[0] * copy.shape[1] + index[1],
        copy.shape[1],
        _scale_base(copy) + 4 * (begin[0] * across + begin[1]),
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
    first = (index[0] * whole.stride + index[1]) * whole.itemsize
    return replace(whole, address=whole.address + first, rows=shape[0], cols=shape[1])


def _planes(copy: Copy, slot: int) -> Iterator[tuple[tuple[int, ...], Part]]:
    """Yield the start of every 2-D plane of a copy, and its place in the copy's digest."""
    lead = copy.shape[:-2]
    zeros = (0,) * (len(copy.shape) - len(lead))
    rows, cols = _two_dims(copy.shape)
    for number, index in enumerate(product(*map(range, lead))):
        yield (*index, *zeros), Part(slot, number * rows * cols * ITEMSIZE[copy.dtype])


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
