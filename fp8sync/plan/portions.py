"""A plan in portions, each of which has arrived and is installed before the next begins."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8sync.plan.build import Plan
    from fp8sync.plan.copy import Copy

__all__ = ["in_portions"]


def in_portions(plan: Plan, portions: Mapping[int, Sequence[Sequence[str]]]) -> tuple[Plan, ...]:
    """Cut a plan by the storages that its copies arrive in.

    Args:
        plan: of all destination ranks, or of one.
        portions: by destination rank, the storages of each of its portions. Ranks may have different
            numbers of them; without any, a rank takes all in the first.

    Returns:
        One plan per portion, copies in wire order; the plan itself where there is only one.
    """
    count = max((len(own) for own in portions.values()), default=1)
    if count <= 1:
        return (plan,)
    number = {
        (rank, storage): n
        for rank, own in portions.items()
        for n, storages in enumerate(own)
        for storage in storages
    }
    copies: list[list[Copy]] = [[] for _ in range(count)]
    for copy in plan.copies:
        copies[number.get((copy.destination_rank, copy.at.storage), 0)].append(copy)
    return tuple(replace(plan, copies=tuple(own)) for own in copies)
