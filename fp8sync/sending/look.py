"""Whether storages still lie where and as they did, asked before every launch of every refit.

A trainer may have as many storages as tensors, so no bytecode runs for each of them. They are looked at some
at a time: a processor's cache holds so many, and what a look makes is gone before the collector counts it.
"""

from __future__ import annotations

from itertools import compress
from operator import attrgetter, not_
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8sync.wire.payload import Storages

__all__ = ["Look"]

AT_ONCE = 256
"""Storages that are looked at together."""

_SEEN: tuple[Callable[[torch.Tensor], Any], ...] = (
    torch.Tensor.data_ptr,
    attrgetter("shape"),
    torch.Tensor.is_contiguous,
    attrgetter("dtype"),
)


class Look:
    """Where storages lay, and their dtype, shape and strides.

    Args:
        storages: among which they are.
        names: of those that are looked at.
    """

    def __init__(self, storages: Storages, names: Sequence[str]) -> None:
        self._blocks: list[tuple[Sequence[str], list[list[Any]]]] = []
        shapes: dict[torch.Size, torch.Size] = {}  # few, and kept for the next refits
        for first in range(0, len(names), AT_ONCE):
            some = names[first : first + AT_ONCE]
            seen = _seen(storages, some)
            seen[1] = list(map(shapes.setdefault, seen[1], seen[1]))
            self._blocks.append((some, seen))

    def holds(self, storages: Storages) -> bool:
        """Whether nothing of it has changed."""
        return all(_seen(storages, names) == seen for names, seen in self._blocks)


def _seen(storages: Storages, names: Sequence[str]) -> list[list[Any]]:
    tensors = list(map(storages.__getitem__, names))
    seen = [list(map(of, tensors)) for of in _SEEN]
    # Of contiguous ones the shape says the strides.
    strided = compress(tensors, map(not_, seen[2]))
    return [*seen, list(map(torch.Tensor.stride, strided))]
