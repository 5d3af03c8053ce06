"""The FP32 masters of a Megatron optimizer, as rectangles of the parameters they belong to.

A distributed optimizer divides each parameter among the data-parallel ranks as if it were flat: a rank
owns the elements from one number up to another, wherever that cuts the rows. Such a run of elements is
at most three rectangles: the end of a row, whole rows, the beginning of a row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8sync.manifest import Box, Placement
from fp8sync.plan.boxes import Rect, overlap

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from fp8sync.sources.megatron.pieces import Layout, Shape

__all__ = ["MASTER_SUFFIX", "Master", "Masters", "master_boxes", "rectangles"]

MASTER_SUFFIX = "_master"


class Master(NamedTuple):
    """A parameter's master on this rank: its elements from flat number `begin` on, if any."""

    begin: int
    tensor: torch.Tensor | None


class Masters:
    """Finds the masters of parameters.

    Args:
        optimizer: what `get_megatron_optimizer` returned, distributed or not.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizers = list(getattr(optimizer, "chained_optimizers", [optimizer]))

    def of(self, parameter: Any) -> Master | None:
        """Return the master of a parameter; None if it has none, being FP32 itself or a buffer.

        Raises:
            ValueError: the optimizer keeps its masters where they cannot be read.
        """
        if not hasattr(parameter, "main_param"):
            return None
        tensor = parameter.main_param
        if not getattr(parameter, "main_param_sharded", False):
            return Master(0, tensor)
        for optimizer in self._optimizers:
            if parameter in getattr(optimizer, "model_param_gbuf_map", ()):
                owned = optimizer._get_model_param_range_map(parameter)["param"]
                if tensor is None or tensor.numel() != owned.end - owned.start:
                    found = "none" if tensor is None else f"{tensor.numel()} of them"
                    raise ValueError(
                        f"expected FP32 masters of elements {owned.start}:{owned.end}, found {found} "
                        "(a precision-aware optimizer keeps its masters to itself)"
                    )
                return Master(owned.start, tensor)
        return Master(0, None)


def master_boxes(storage: str, layout: Layout, local: Shape, master: Master) -> Iterator[Box]:
    """Yield the boxes of what this rank owns of a parameter's master.

    Args:
        storage: name of the master's storage.
        layout: what the parameter holds.
        local: the parameter's shape.
        master: the elements that this rank owns.
    """
    if master.tensor is None:
        return
    strides = _contiguous(local)
    for rect in rectangles(local, master.begin, master.tensor.numel()):
        for piece in layout.pieces:
            common = overlap((piece.local, piece.shape), rect)
            if common is None:
                continue
            at, shape = common
            first = sum(i * stride for i, stride in zip(at, strides, strict=True))
            moved = zip(piece.start, at, piece.local, strict=True)
            start = tuple(begin + i - local_begin for begin, i, local_begin in moved)
            yield Box(piece.tensor, start, shape, Placement(storage, first - master.begin, strides))


def rectangles(shape: Shape, begin: int, count: int) -> Iterator[Rect]:
    """Yield the rectangles of a row-major tensor that hold elements [begin, begin + count).

    Raises:
        ValueError: the tensor has more than two dims.
    """
    if len(shape) > 2:
        raise ValueError(f"expected a master of one or two dims, found {list(shape)}")
    if len(shape) < 2:
        yield (begin,), (count,)
        return
    columns, end = shape[1], begin + count
    while begin < end:
        row, column = divmod(begin, columns)
        if column or end - begin < columns:
            width = min(columns - column, end - begin)
            yield (row, column), (1, width)
            begin += width
        else:
            rows = (end - begin) // columns
            yield (row, 0), (rows, columns)
            begin += rows * columns


def _contiguous(shape: Shape) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
