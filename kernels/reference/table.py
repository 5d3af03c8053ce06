"""The reference of the grouped kernel: the same table, row by row, in PyTorch.

It reads and writes the memory that the table's addresses name, on the CPU or on the current GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8sync_kernels.descriptor import DTYPE_COUNTED, TORCH_OF_DTYPE, Column, Dtype, Op
from fp8sync_kernels.formulas import BLOCK, FP32, POW2
from fp8sync_kernels.memory import rectangle_at
from fp8sync_kernels.reference.blockwise import count_nonfinite, partial_amax, quantize_blockwise
from fp8sync_kernels.reference.canonical import canonical_pair
from fp8sync_kernels.reference.digest import digest_rows

if TYPE_CHECKING:
    from fp8sync_kernels.table import Table

_FORMULA = {Op.POW2: POW2, Op.POW2_GIVEN: POW2, Op.FP32: FP32, Op.FP32_GIVEN: FP32}


def run_table_reference(
    table: Table, digests: torch.Tensor | None, nonfinite: torch.Tensor | None
) -> None:
    """Same arguments and effects as `fp8sync_kernels.launch.run_table`."""
    for values in table.rows.tolist():
        row = Row(values, table.rows.device)
        slot = row[Column.SLOT]
        if nonfinite is not None:
            nonfinite[slot] += _nonfinite(row)
        if row.op == Op.COPY or row.op in DTYPE_COUNTED:
            value = _move(row, row.source())
        elif row.op == Op.CAST:
            value = _move(row, row.source().to(row.dtype(Column.DESTINATION_DTYPE)))
        elif row.op == Op.CANONICAL:
            weight, scale_inv = canonical_pair(row.source(), row.scale_inv())
            value = row.digest(weight) + row.digest_scales(scale_inv)
        else:
            value = _blockwise(row)
        if digests is not None:
            digests[slot] += _signed(value)


class Row:
    """One row of a table with the tensors it names."""

    def __init__(self, values: list[int], device: torch.device) -> None:
        self.values = values
        self.device = device
        self.op = Op(values[Column.OP])
        self.shape = (values[Column.ROWS], values[Column.COLS])
        self.origin = (values[Column.ROW_ORIGIN], values[Column.COL_ORIGIN])

    def __getitem__(self, column: Column) -> int:
        return self.values[column]

    def dtype(self, column: Column) -> torch.dtype:
        """The dtype that a column of codes names."""
        return TORCH_OF_DTYPE[Dtype(self[column])]

    def source(self) -> torch.Tensor:
        """The rectangle read."""
        stride, dtype = self[Column.SOURCE_STRIDE], self.dtype(Column.SOURCE_DTYPE)
        return rectangle_at(self[Column.SOURCE], self.shape, stride, dtype, self.device)

    def scale_inv(self) -> torch.Tensor:
        """Scales of every block touched."""
        return self._grid(Column.SCALE_INV, Column.SCALE_STRIDE)

    def amax(self) -> torch.Tensor:
        """Given or wanted amax of every block touched."""
        return self._grid(Column.AMAX, Column.AMAX_STRIDE)

    def store(self, data: torch.Tensor) -> None:
        """Write the rectangle's result, if it has a destination."""
        if self[Column.DESTINATION]:
            stride = self[Column.DESTINATION_STRIDE]
            address = self[Column.DESTINATION]
            out = rectangle_at(address, self.shape, stride, data.dtype, self.device)
            out.copy_(data)

    def digest(self, data: torch.Tensor) -> int:
        """Digest a result at the position that the row gives it."""
        return digest_rows(data, self[Column.DIGEST_BASE], self[Column.DIGEST_PITCH])

    def digest_scales(self, scale_inv: torch.Tensor) -> int:
        """Digest scales at the position that the row gives them."""
        base, pitch = self[Column.SCALE_DIGEST_BASE], self[Column.SCALE_DIGEST_PITCH]
        return digest_rows(scale_inv, base, pitch)

    def _grid(self, address: Column, stride: Column) -> torch.Tensor:
        down = -(-(self.origin[0] + self.shape[0]) // BLOCK)
        across = -(-(self.origin[1] + self.shape[1]) // BLOCK)
        shape = (down, across)
        return rectangle_at(self[address], shape, self[stride], torch.float32, self.device)


def _nonfinite(row: Row) -> int | torch.Tensor:
    if row.op in (Op.COPY, Op.CANONICAL):
        return 0
    if row.op == Op.CAST:
        return count_nonfinite(row.source().to(row.dtype(Column.DESTINATION_DTYPE)))
    if row.op in DTYPE_COUNTED:
        return count_nonfinite(row.source().contiguous().view(DTYPE_COUNTED[row.op]).float())
    return count_nonfinite(row.source())


def _move(row: Row, data: torch.Tensor) -> int:
    row.store(data)
    return row.digest(data)


def _blockwise(row: Row) -> int:
    x = row.source()
    if row.op == Op.AMAX:
        row.amax().copy_(partial_amax(x, origin=row.origin))
        return 0
    given = row.amax() if row.op in (Op.POW2_GIVEN, Op.FP32_GIVEN) else None
    weight, scale_inv, _ = quantize_blockwise(x, _FORMULA[row.op], amax=given, origin=row.origin)
    value = _move(row, weight.view(torch.uint8))
    if row[Column.SCALE_INV]:
        row.scale_inv().copy_(scale_inv)
        value += row.digest_scales(scale_inv)
    return value


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value
