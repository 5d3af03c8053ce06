"""Which rectangle of a tensor a view shows, from shapes and strides alone."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fp8sync.plan.boxes import Rect

__all__ = ["Form", "joined", "shown"]

_REMEMBERED = 1 << 15


class Form(NamedTuple):
    """Where a tensor's elements lie in its storage; all in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        """Return the form of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


@lru_cache(_REMEMBERED)
def joined(
    tensor: Form, src: Form, parameter: Form, dst: Form
) -> tuple[Rect, Rect, tuple[int, ...]] | None:
    """Return what a copy from a view of a tensor to a view of a parameter joins.

    Layers and experts are alike, so most of this is asked many times.

    Returns:
        (rectangle of the tensor, rectangle of the parameter, strides of the parameter along the tensor's
        dims), or None where one of the views is no rectangle or they are not cut alike.
    """
    source, target = shown(tensor, src), shown(parameter, dst)
    sizes = [n for n in src.shape if n > 1]
    if source is None or target is None or sizes != [n for n in dst.shape if n > 1]:
        return None
    steps = [s for n, s in zip(dst.shape, dst.strides, strict=True) if n > 1]
    strides = [0] * len(tensor.shape)
    for dim, step in zip(source[1], steps, strict=True):
        strides[dim] = step
    return source[0], target[0], tuple(strides)


def shown(base: Form, view: Form) -> tuple[Rect, list[int]] | None:
    """Return the rectangle of `base` that `view` shows, or None where it shows something else.

    Returns:
        ((start, shape), dims): `dims[i]` is the base dim of the i-th view dim of size > 1.
    """
    rest = view.offset - base.offset
    order = sorted(range(len(base.shape)), key=base.strides.__getitem__, reverse=True)
    start, shape = [0] * len(base.shape), [1] * len(base.shape)
    for dim in order:
        if base.shape[dim] > 1:
            start[dim], rest = divmod(rest, base.strides[dim])
    if rest:
        return None
    dims: list[int] = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size == 1:
            continue
        match = _dim_with_stride(base, stride, order, dims)
        if match is None or start[match] + size > base.shape[match]:
            return None
        shape[match] = size
        dims.append(match)
    if not math.prod(view.shape) or any(s >= n for s, n in zip(start, base.shape, strict=True)):
        return None
    return (tuple(start), tuple(shape)), dims


def _dim_with_stride(
    base: Form, stride: int, order: Sequence[int], taken: Sequence[int]
) -> int | None:
    for dim in order:
        if base.shape[dim] > 1 and base.strides[dim] == stride and dim not in taken:
            return dim
    return None
