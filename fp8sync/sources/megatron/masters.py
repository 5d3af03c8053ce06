"""The FP32 masters of parameters, as rectangles of the parameters they belong to.

Megatron's optimizers leave a parameter's master with the parameter, as `main_param`.

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
    from collections.abc import Iterator, Sequence

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
        chunks: this rank's model chunks; wrapped in DDP, if a distributed optimizer divides the masters.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._divided = [chunk for chunk in chunks if _is_divided(chunk)]
        self._owned = {p: owned for chunk in self._divided for p, owned in _owned(chunk)}

    def of(self, parameter: Any, expert: int | None = None) -> Master | None:
        """Return the master of a parameter; None if it has none: FP32 itself, frozen, or a buffer.

        Args:
            parameter: as the module has it.
            expert: which of the experts that it stacks, if it does.

        Raises:
            ValueError: there is no optimizer, or it keeps its masters where they cannot be read.
        """
        if not hasattr(parameter, "main_param"):
            if parameter.requires_grad and parameter.dtype.itemsize < 4:
                raise ValueError(
                    "expected an FP32 master (main_param), found none; has the optimizer been made?"
                )
            return None
        tensor = parameter.main_param
        if not getattr(parameter, "main_param_sharded", False):
            return _of_expert(Master(0, tensor), parameter, expert)
        if not self._divided:
            raise ValueError(
                "its master is divided among data-parallel ranks: expected the chunks as DDP wraps them"
            )
        begin, end = self._owned.get(parameter, (0, 0))
        found = 0 if tensor is None else tensor.numel()
        if found != end - begin:
            raise ValueError(
                f"expected FP32 masters of elements {begin}:{end}, found {found} of them "
                "(a precision-aware optimizer keeps its masters to itself)"
            )
        return _of_expert(Master(begin, tensor), parameter, expert)


def _of_expert(master: Master, parameter: Any, expert: int | None) -> Master:
    if expert is None or master.tensor is None:
        return master
    size = parameter.numel() // len(parameter)
    flat = master.tensor.view(-1)
    begin, end = (
        min(max(edge, master.begin), master.begin + flat.numel())
        for edge in (expert * size, (expert + 1) * size)
    )
    if begin == end:
        return Master(0, None)
    return Master(begin - expert * size, flat[begin - master.begin : end - master.begin])


def _is_divided(chunk: Any) -> bool:
    config = getattr(chunk, "ddp_config", None)
    divided = getattr(config, "use_distributed_optimizer", False)
    return bool(divided and not getattr(config, "use_megatron_fsdp", False))


def _owned(chunk: Any) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Yield which elements of each parameter this rank's optimizer owns, as it finds them itself."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        for buckets in DistributedOptimizer._build_gbuf_range_map(buffer).values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, (ranges["param"].start, ranges["param"].end)


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
