"""Building descriptor tables from jobs. Done once for a plan; launches then need no host work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fp8sync_kernels.descriptor import (
    COLUMNS,
    COUNTED,
    CUT,
    DIVISION,
    DTYPE_COUNTED,
    DTYPE_OF_TORCH,
    TILE_OF_PATH,
    Column,
    Op,
    Path,
)
from fp8sync_kernels.formulas import BLOCK
from fp8sync_kernels.job import Job, Matrix

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LINE_BYTES = TILE_OF_PATH[Path.COPY_16][1]
_WIDE_PATH = {
    torch.bfloat16: Path.WIDE_BF16,
    torch.float16: Path.WIDE_FP16,
    torch.float32: Path.WIDE_FP32,
    torch.float8_e4m3fn: Path.WIDE_CODES,
    torch.uint8: Path.WIDE_CODES,
}
_COPIES = (Op.COPY, *DTYPE_COUNTED)
_DIVIDING = (Op.FP32, Op.FP32_GIVEN)
_WIDE_TO_ANY = Path.ANY_BF16 // Path.WIDE_BF16


@dataclass(frozen=True)
class Table:
    """A descriptor table on a device.

    Attributes:
        rows: int64 ``[rows, 24]``, laid out by `fp8sync_kernels.descriptor.Column`.
        block_row: int32 ``[blocks]``, the row that each block belongs to.
        blocks: number of blocks (programs that have work).
        paths: bit set of the paths in use, DIVISION, CUT and COUNTED.
        slots: smallest length that digests and counts must have.

    Examples:
        >>> from fp8sync_kernels.job import Part, copy
        >>> table = build_table([copy(torch.ones(128), None, Part(slot=4))], "cpu")
        >>> tuple(table.rows.shape), table.slots
        ((1, 24), 5)
    """

    rows: torch.Tensor
    block_row: torch.Tensor
    blocks: int
    paths: int
    slots: int

    def to(self, device: torch.device | str) -> Table:
        """The same table on another device (its addresses are not translated)."""
        return replace(self, rows=self.rows.to(device), block_row=self.block_row.to(device))

    def part(self, start: int, stop: int) -> Table:
        """The rows of slots start..stop-1 as a table, with slots counted from `start`.

        `paths` are the whole table's, so all parts are run by one kernel (but for one of a single row).

        Raises:
            ValueError: rows do not lie in the order of their slots.

        Examples:
            >>> from fp8sync_kernels.job import Part, copy
            >>> whole = build_table([copy(torch.ones(64), None, Part(n)) for n in range(4)], "cpu")
            >>> whole.part(1, 3).blocks, whole.part(1, 3).slots
            (2, 2)
        """
        slots = self.rows[:, Column.SLOT].contiguous()
        if bool((slots[1:] < slots[:-1]).any()):
            raise ValueError("rows do not lie in the order of their slots")
        first, last = torch.searchsorted(slots, slots.new_tensor([start, stop])).tolist()
        rows = self.rows[first:last].clone()
        before, blocks = torch.searchsorted(
            self.block_row, self.block_row.new_tensor([first, last])
        ).tolist()
        rows[:, Column.SLOT] -= start
        rows[:, Column.FIRST_BLOCK] -= before
        block_row = self.block_row[before:blocks] - first
        return Table(rows, block_row, blocks - before, self.paths, stop - start)


def build_table(jobs: Iterable[Job], device: torch.device | str) -> Table:
    """Lay out jobs as one table, in order.

    Args:
        jobs: of `fp8sync_kernels.job`. Empty rectangles are dropped.
        device: that will run the launches.

    Returns:
        The table, on that device.

    Raises:
        ValueError: digest positions that a kernel cannot address or that overlap, or more than
            2^31 - 1 blocks.

    Examples:
        >>> from fp8sync_kernels.job import copy
        >>> build_table([copy(torch.ones(128), None), copy(torch.ones(0), None)], "cpu").blocks
        1
    """
    encoded: list[list[int]] = []
    counts: list[int] = []
    blocks = paths = slots = 0
    for job in _pieces(jobs):
        row, count = _encode(job, blocks)
        encoded.append(row)
        counts.append(count)
        blocks += count
        paths |= row[Column.PATH] | (DIVISION if job.op in _DIVIDING else 0)
        paths |= CUT if _is_cut(job, row[Column.PATH]) else 0
        paths |= COUNTED if job.op in DTYPE_COUNTED else 0
        slots = max(slots, job.part.slot + 1)
    if blocks >= 1 << 31:
        raise ValueError(f"{blocks} blocks are too many for one table; split it")
    rows = torch.tensor(encoded, dtype=torch.int64).view(-1, COLUMNS)
    block_row = torch.repeat_interleave(
        torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts, dtype=torch.int64)
    )
    return Table(rows.to(device), block_row.to(device), blocks, paths, slots)


def _pieces(jobs: Iterable[Job]) -> Iterator[Job]:
    for job in jobs:
        if job.source.rows == 0 or job.source.cols == 0:
            continue
        if job.op in _COPIES and _is_one_run(job):
            yield from _lines(job)
        else:
            yield job


def _is_one_run(job: Job) -> bool:
    """A contiguous copy. Whatever its shape, it is cut into lines that fill the kernel's tile."""
    ends = [job.source] if job.destination is None else [job.source, job.destination]
    if job.source.rows > 1 and job.part.pitch not in (None, job.source.cols):
        return False
    return all(end.rows == 1 or end.stride == end.cols for end in ends)


def _lines(job: Job) -> Iterator[Job]:
    size = job.source.rows * job.source.cols
    whole = size - size % _LINE_BYTES
    for start, rows, cols in (
        (0, whole // _LINE_BYTES, _LINE_BYTES),
        (whole, 1, size - whole),
    ):
        if rows == 0 or cols == 0:
            continue
        source = Matrix(job.source.address + start, rows, cols, cols, torch.uint8)
        target = job.destination
        if target is not None:
            target = Matrix(target.address + start, rows, cols, cols, torch.uint8)
        part = replace(job.part, base=job.part.base + start, pitch=cols)
        yield replace(job, source=source, destination=target, part=part)


def _encode(job: Job, first_block: int) -> tuple[list[int], int]:
    source, target, part = job.source, job.destination, job.part
    written = source if target is None else target
    width = source.cols if job.op <= Op.AMAX else source.cols * written.itemsize
    pitch = width if part.pitch is None else part.pitch
    across = -(-(job.origin[1] + source.cols) // 128)
    scale_base = part.scale_base
    if scale_base is None:
        scale_base = part.base + -(-source.rows * width // 16) * 16
    scale_pitch = 4 * across if part.scale_pitch is None else part.scale_pitch
    _check_positions(job, width, pitch, scale_base, scale_pitch)
    path = _path(job, pitch)
    tile_rows, tile_cols = TILE_OF_PATH[path]
    down = -(-(job.origin[0] + source.rows) // tile_rows)
    across = -(-(job.origin[1] + source.cols) // tile_cols)
    row = [0] * COLUMNS
    row[Column.SOURCE] = source.address
    row[Column.SOURCE_STRIDE] = source.stride
    row[Column.ROWS] = source.rows
    row[Column.COLS] = source.cols
    if target is not None:
        row[Column.DESTINATION] = target.address
        row[Column.DESTINATION_STRIDE] = target.stride
    if job.scale_inv is not None:
        row[Column.SCALE_INV] = job.scale_inv.address
        row[Column.SCALE_STRIDE] = job.scale_inv.stride
    if job.amax is not None:
        row[Column.AMAX] = job.amax.address
        row[Column.AMAX_STRIDE] = job.amax.stride
    row[Column.ROW_ORIGIN], row[Column.COL_ORIGIN] = job.origin
    row[Column.OP] = job.op
    row[Column.PATH] = path
    row[Column.SOURCE_DTYPE] = DTYPE_OF_TORCH[source.dtype]
    row[Column.DESTINATION_DTYPE] = DTYPE_OF_TORCH[written.dtype]
    row[Column.SLOT] = part.slot
    row[Column.DIGEST_BASE] = part.base
    row[Column.DIGEST_PITCH] = pitch
    row[Column.SCALE_DIGEST_BASE] = scale_base
    row[Column.SCALE_DIGEST_PITCH] = scale_pitch
    row[Column.FIRST_BLOCK] = first_block
    row[Column.BLOCK_COLS] = across
    return row, down * across


def _path(job: Job, pitch: int) -> Path:
    if job.op == Op.CAST:
        return Path.CAST
    ends = [job.source] if job.destination is None else [job.source, job.destination]
    words = job.part.base % 4 == 0 and (pitch % 4 == 0 or job.source.rows == 1)
    wide = words and job.source.cols % 16 == 0 and job.origin[1] % 16 == 0
    wide = wide and all(_aligned(end, 16) for end in ends)
    if job.op in _COPIES:
        if wide:
            return Path.COPY_16
        narrow = words and job.source.cols % 4 == 0 and all(_aligned(end, 4) for end in ends)
        return Path.COPY_4 if narrow else Path.COPY_1
    wide = wide and all(_near(end) for end in ends)
    path = _WIDE_PATH[job.source.dtype]
    return path if wide else Path(path * _WIDE_TO_ANY)


def _near(matrix: Matrix) -> bool:
    """Whether 32 bits suffice for positions within a block, and for a column's within a row."""
    return max(matrix.cols, matrix.stride) * matrix.itemsize < 1 << 26


def _is_cut(job: Job, path: int) -> bool:
    if path not in _WIDE_PATH.values():
        return False
    return any((*job.origin, job.source.rows % BLOCK, job.source.cols % BLOCK))


def _aligned(matrix: Matrix, size: int) -> bool:
    strided = matrix.rows == 1 or matrix.stride * matrix.itemsize % size == 0
    return matrix.address % size == 0 and strided


def _check_positions(job: Job, width: int, pitch: int, scale_base: int, scale_pitch: int) -> None:
    source, base = job.source, job.part.base
    if job.part.slot < 0 or base < 0 or scale_base < 0:
        raise ValueError(f"slot, base and scale_base must not be negative: {job.part}")
    if source.rows > 1 and pitch < width:
        raise ValueError(f"rows of {width} bytes would be digested {pitch} bytes apart: {job.part}")
    scales = job.scale_inv
    if scales is not None:
        if scale_base % 4 or scale_pitch % 4:
            raise ValueError(f"scale_inv is digested at multiples of 4 bytes: {job.part}")
        if scales.rows > 1 and scale_pitch < 4 * scales.cols:
            raise ValueError(f"{scales.cols} scales would not fit into their pitch: {job.part}")
        end = scale_base + (scales.rows - 1) * scale_pitch + 4 * scales.cols
        if base < end and scale_base < base + (source.rows - 1) * pitch + width:
            raise ValueError(
                f"scale_inv would be digested from byte {scale_base}, among the codes: {job.part}"
            )
    if job.op == Op.CAST and job.destination is not None:
        size = job.destination.itemsize
        if base % size or (pitch % size and source.rows > 1):
            raise ValueError(f"elements of {size} bytes digested at odd positions: {job.part}")
    if source.cols >= 1 << 31 or source.rows >= 1 << 31:
        raise ValueError(f"a rectangle of {source.rows}x{source.cols} is too large")
