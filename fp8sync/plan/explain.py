"""A plan in words."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from fp8sync.plan.formats import MISC
from fp8sync.recipe import Encoding

if TYPE_CHECKING:
    from fp8sync.manifest import TensorInfo
    from fp8sync.plan.build import Plan

__all__ = ["LinkPlan", "explain"]


def explain(plan: Plan) -> str:
    """Return what the plan does: totals, bytes per link, and what is misc or left out, with reasons."""
    links: Counter[tuple[str, int, int]] = Counter()
    kinds: Counter[str] = Counter()
    for copy in plan.copies:
        nbytes = copy.weight_bytes + copy.scale_bytes
        side, sender = ("", copy.source_rank) if copy.via is None else ("engine ", copy.via)
        links[side, sender, copy.destination_rank] += nbytes
        kinds[_kind(plan.tensors[copy.tensor])] += nbytes
    sent = [t for t in plan.tensors.values() if not t.unused]
    misc = [t for t in sent if t.misc]
    lines = [
        f"{len(sent)} tensors in {len(plan.copies)} copies, {sum(links.values()):,} bytes",
        f"bulk: {len(sent) - len(misc)} tensors; misc: {len(misc)}",
        *_scale_lines(plan),
        *(f"  {kind}: {nbytes:,} bytes" for kind, nbytes in sorted(kinds.items())),
        *_amax_lines(plan),
        *(f"link {side}{a} -> {b}: {n:,} bytes" for (side, a, b), n in sorted(links.items())),
        *(f"misc {t.name}: {t.misc}" for t in misc),
        *(f"left out {t.name}: {t.unused}" for t in plan.tensors.values() if t.unused),
    ]
    return "\n".join(lines)


def _scale_lines(plan: Plan) -> list[str]:
    """With the recipe's `scales="misc"`: codes are bulk, scales go whole to the engine's loader."""
    apart = {
        copy.tensor
        for copy in plan.copies
        if copy.scale_at is not None and copy.scale_at.storage.startswith(MISC)
        if not plan.tensors[copy.tensor].misc
    }
    return [f"misc scale_inv of {len(apart)} bulk tensors"] if apart else []


def _amax_lines(plan: Plan) -> list[str]:
    if not plan.amax:
        return []
    tensors = len({g.tensor for g in plan.amax})
    blocks = sum(math.prod(g.shape) for g in plan.amax)
    between = sum(len(g.ranks) > 1 for g in plan.amax)
    line = (
        f"partial amax: {blocks:,} blocks of {tensors} tensors in {len(plan.amax)} groups, "
        f"{between} of them between ranks"
    )
    return [line]


def _kind(info: TensorInfo) -> str:
    if info.encoding is Encoding.PLAIN:
        return info.dtype
    return f"blockwise FP8, {info.formula.value if info.formula else '?'} scales"


class LinkPlan:
    """The agreed plan, and what it says of itself; made by a link.

    Args:
        plan: as both sides computed it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def explain(self) -> str:
        """Return totals, bytes per link, and what is misc or left out with its reasons, as text.

        Examples:
            >>> print(link.plan.explain())  # doctest: +SKIP
        """
        return explain(self.plan)
