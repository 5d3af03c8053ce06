"""How a trainer rank's weights lie: they may move between refits, but not change dtype, shape or strides.

A plan counts elements from a storage's first, by the strides of when the link was made. Of a weight with others
it may find other elements, or none, and a table that was made for another dtype reads values that are not there:
nothing after this check would notice, and digests would agree on the wrong bytes.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import TensorMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from fp8sync.manifest import Box
    from fp8sync.plan import Copy
    from fp8sync.wire.payload import Storages

    Lie = tuple[torch.dtype, torch.Size, tuple[int, ...]]

__all__ = ["Alike", "kept_in", "read_by"]


def read_by(copies: Iterable[Copy]) -> list[str]:
    """Return the source's storages that copies read, each once."""
    places = (at for c in copies for at in (c.source_at, c.source_scale_at) if at is not None)
    return list(dict.fromkeys(at.storage for at in places))


def kept_in(boxes: Iterable[Box]) -> list[str]:
    """Return the storages that boxes lie in, each once."""
    places = (at for box in boxes for at in (box.at, box.scale_at) if at is not None)
    return list(dict.fromkeys(at.storage for at in places))


class Alike:
    """What a trainer rank's storages were when they were first looked at, which they have to stay.

    Args:
        rank: this rank among the trainer's.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._first: dict[str, Lie] = {}

    def check(self, storages: Storages, names: Collection[str]) -> None:
        """Look at the named storages; those that are looked at for the first time are remembered.

        Raises:
            TensorMismatch: some have another dtype, shape or strides, or their memory was freed; all at once.
        """
        tensors = list(map(storages.__getitem__, names))
        # No bytecode for each storage: there may be as many as tensors.
        sizes, strides = map(torch.Tensor.size, tensors), map(torch.Tensor.stride, tensors)
        found = zip(map(attrgetter("dtype"), tensors), sizes, strides, strict=True)
        faults = [
            f"{name}: expected {_told(first)}, found {_told(lie)}"
            for name, lie in zip(names, found, strict=True)
            if (first := self._first.setdefault(name, lie)) != lie and not _same(first, lie)
        ]
        whose = f"weights of trainer rank {self._rank}"
        if freed := [
            f"{name}: expected data, found freed memory"
            for name, tensor in zip(names, tensors, strict=True)
            if tensor.numel() and not tensor.untyped_storage().nbytes()
        ]:
            raise TensorMismatch(f"{whose} hold no data; bring it back first", freed + faults)
        if faults:
            remedy = "close the link (`fp8sync.close` where `refit` keeps it) and connect again"
            told = f"{whose} lie otherwise than when the link was made; {remedy}"
            raise TensorMismatch(told, faults)

    def read(self, source: Callable[[], Storages], names: Collection[str]) -> Storages:
        """Return what `source` returns, checked."""
        storages = source()
        self.check(storages, names)
        return storages


def _same(one: Lie, other: Lie) -> bool:
    """Whether every index is at the same place; the stride of a dim of size 1 says nothing of that."""
    strides = zip(one[1], one[2], other[2], strict=False)
    return one[:2] == other[:2] and all(a == b for size, a, b in strides if size > 1)


def _told(lie: Lie) -> str:
    dtype, shape, strides = lie
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)} with strides {strides}"
