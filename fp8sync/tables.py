"""The plan as descriptor tables: what the grouped kernels write, and what they check.

A copy's digest covers its elements row after row and, from the next multiple of 16 bytes, its scale_inv:
the same bytes as its part in a bucket. Slot i of a table is the i-th copy.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import ITEMSIZE, Placement
from fp8sync.plan.bucket import ALIGN
from fp8sync.recipe import Encoding
from fp8sync_kernels import Job, Matrix, Part, Table, build_table, job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp8sync.plan import Copy

__all__ = ["check_table", "unwritable", "write_table"]

_COUNTED = (torch.bfloat16, torch.float16, torch.float32)


def unwritable(copies: Sequence[Copy]) -> str:
    """Return why these copies cannot be written one-sided, or an empty string."""
    for copy in copies:
        if copy.encoding is Encoding.BLOCKWISE and copy.scale_at is None:
            return "the engine dequantizes what it receives"
        if copy.encoding is Encoding.BLOCKWISE and any(copy.origin):
            return f"{copy.tensor} is cut inside a block"
        for at in (copy.source_at, copy.at):
            if copy.shape and copy.shape[-1] > 1 and at.strides[-1] != 1:
                return f"{copy.tensor} is not stored row by row"
    return ""


def write_table(
    copies: Sequence[Copy],
    source: Callable[[str], tuple[int, str]],
    destination: Callable[[str], int],
    device: torch.device,
) -> Table:
    """Quantize, cast or copy every source rectangle to its destination.

    Args:
        copies: of one source rank; slot i is copies[i].
        source: address and dtype of a source storage.
        destination: address of a destination storage, as `device` sees it.
        device: that launches.

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
            x = _matrix(base, copy.source_at.at(index), copy.shape, dtype)
            out = _matrix(target, copy.at.at(index), copy.shape, copy.dtype)
            jobs += _write(copy, x, out, part, source, destination)
    return build_table(jobs, device)


def check_table(
    copies: Sequence[Copy], destination: Callable[[str], int], device: torch.device
) -> Table:
    """Digest what lies at the copies' destinations; writes nothing."""
    jobs: list[Job] = []
    for slot, copy in enumerate(copies):
        target = destination(copy.at.storage)
        for index, part in _planes(copy, slot):
            out = _matrix(target, copy.at.at(index), copy.shape, copy.dtype)
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
) -> Iterator[Job]:
    if copy.scale_at is None:
        # A cast to the same dtype changes nothing, but unlike a copy it counts NaN and Inf.
        floats = x.dtype in _COUNTED and out.dtype in _COUNTED
        yield job.cast(x, out, part) if floats else job.copy(x, out, part)
        return
    scales = _scales(copy, destination(copy.scale_at.storage), copy.scale_at)
    if copy.source_scale_at is not None:
        held = _scales(copy, source(copy.source_scale_at.storage)[0], copy.source_scale_at)
        yield job.copy(x, out, part)
        yield job.copy(held, scales, Part(part.slot, _scale_base(copy)))
    elif copy.formula is not None:
        yield job.quantize(x, copy.formula.value, out, scales, part)


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


def _matrix(base: int, at: Placement, shape: Sequence[int], dtype: str) -> Matrix:
    rows, cols = _two_dims(shape)
    stride = at.strides[-2] if len(shape) > 1 and rows > 1 else cols
    address = base + at.offset * ITEMSIZE[dtype]
    return Matrix(address, rows, cols, stride, getattr(torch, dtype))


def _scales(copy: Copy, base: int, at: Placement) -> Matrix:
    return _matrix(base, at, copy.scale_shape, "float32")


def _scale_base(copy: Copy) -> int:
    return -(-copy.weight_bytes // ALIGN) * ALIGN
