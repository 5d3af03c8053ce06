"""Rank grids: a rank's coordinates on named axes, the leftmost axis changing fastest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Grid", "check_sizes", "stage_of_layer"]


def check_sizes(sizes: Mapping[str, float], least: float = 1) -> None:
    """Raise ValueError for sizes by name of which one is below `least`."""
    faults = [
        f"{name}: expected at least {least}, found {size}"
        for name, size in sizes.items()
        if not size >= least
    ]
    if faults:
        raise ValueError("; ".join(faults))


@dataclass(frozen=True)
class Grid:
    """Named axes with sizes.

    Args:
        axes: (name, size), fastest first.
    """

    axes: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(n for _, n in self.axes)

    def ranks(self, **fixed: int) -> tuple[int, ...]:
        """Return all ranks with the coordinates given, in order.

        Raises:
            ValueError: an axis of another name.
        """
        unknown = set(fixed) - {name for name, _ in self.axes}
        if unknown:
            raise ValueError(f"no axis named {', '.join(sorted(unknown))}")
        return _ranks(self.axes, tuple(sorted(fixed.items())))


@lru_cache(maxsize=65536)
def _ranks(
    axes: tuple[tuple[str, int], ...], fixed: tuple[tuple[str, int], ...]
) -> tuple[int, ...]:
    known = dict(fixed)
    spans: list[list[int]] = []
    step = 1
    for name, size in axes:
        at = range(size) if name not in known else (known[name],)
        spans.append([i * step for i in at])
        step *= size
    return tuple(sorted(sum(steps) for steps in product(*spans)))


def stage_of_layer(stages: tuple[int, ...], layer: int) -> int:
    """Return the (virtual) stage of a layer; -1 is the embedding, the first number too large the head."""
    if layer < 0:
        return 0
    for stage, count in enumerate(stages):
        if layer < count:
            return stage
        layer -= count
    return len(stages) - 1
