"""A block whose codes are right and whose scale is not: whose scale is it?

Tried to the bit: the trainer's codes, times each scale that the engine could have taken instead, rounded
as the engine rounds. Where none fits, the factor is said by which the block is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8sync.plan.boxes import touched_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fp8sync.audit.units import Unit

__all__ = ["KnownScales", "common_factor", "whose_scale"]

Grid = list[list[float]]


@dataclass(frozen=True)
class KnownScales:
    """The trainer's scale_inv of the blocks that a unit touches, now and at the audit before."""

    unit: Unit
    now: Grid
    before: Grid | None

    def at(self, block: tuple[int, int]) -> Iterator[tuple[str, float]]:
        """Yield what was the scale of a block, given in blocks of the whole tensor."""
        row, column = (a - b for a, b in zip(block, self._first, strict=True))
        if self.before is not None and self._holds(row, column):
            yield (
                "its scale_inv is stale: the block's at the audit before",
                self.before[row][column],
            )

    def others(self, block: tuple[int, int]) -> Iterator[tuple[str, float]]:
        """Yield what is the scale of any other block."""
        for i, row in enumerate(self.now):
            for j, scale in enumerate(row):
                place = [self._first[0] + i, self._first[1] + j]
                if place != list(block):
                    yield f"its scale_inv is that of block {place}", scale

    @property
    def _first(self) -> tuple[int, ...]:
        return touched_blocks(self.unit.part.copy.rect)[0]

    def _holds(self, row: int, column: int) -> bool:
        return 0 <= row < len(self.now) and 0 <= column < len(self.now[row])


def whose_scale(
    known: Iterable[KnownScales],
    block: tuple[int, int],
    codes: torch.Tensor | None,
    found: torch.Tensor,
) -> str:
    """Return whose scale a block was given, or an empty string.

    Args:
        known: of every unit of the tensor.
        block: in blocks of the whole tensor.
        codes: the trainer's of some of the block's elements, float8_e4m3fn [n]; None if `found` is a scale.
        found: what the engine makes of them, in its dtype [n]; or its scale_inv [1].
    """
    known = list(known)
    stale = (each for unit in known for each in unit.at(block))
    others = (each for unit in known for each in unit.others(block))
    for of in (stale, others):
        for name, scale in of:
            if torch.equal(_values(codes, scale, found.dtype), found):
                return name
    return ""


def _values(codes: torch.Tensor | None, scale: float, dtype: torch.dtype) -> torch.Tensor:
    scales = torch.tensor([scale], dtype=torch.float32)
    values = scales if codes is None else codes.float() * scales
    return values.to(dtype) + 0


def common_factor(expected: torch.Tensor, found: torch.Tensor) -> float | None:
    """The factor between two rows of a block that were rounded to BF16, if there is one."""
    used = expected != 0
    ratios = found[used] / expected[used]
    if not ratios.numel() or (found[~used] != 0).any():
        return None
    factor = ratios.mean()
    # Each side was rounded once, by at most 2^-9 of its value.
    close = ((ratios / factor - 1).abs() <= 2**-7).all()
    return factor.item() if close and factor != 1 else None
