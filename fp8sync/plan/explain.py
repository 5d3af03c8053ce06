"""A plan in words."""

from __future__ import annotations

from collections import Counter

from fp8sync.manifest import TensorInfo
from fp8sync.plan.build import Plan
from fp8sync.recipe import Encoding

__all__ = ["explain"]


def explain(plan: Plan) -> str:
    """Return what the plan does: totals, bytes per link, and the misc list with its reasons."""
    links: Counter[tuple[int, int]] = Counter()
    kinds: Counter[str] = Counter()
    for copy in plan.copies:
        nbytes = copy.weight_bytes
        if copy.encoding is Encoding.BLOCKWISE:
            nbytes += 4 * copy.scale_shape[0] * copy.scale_shape[1]
        links[copy.source_rank, copy.destination_rank] += nbytes
        kinds[_kind(plan.tensors[copy.tensor])] += nbytes
    misc = [t for t in plan.tensors.values() if t.misc]
    lines = [
        f"{len(plan.tensors)} tensors in {len(plan.copies)} copies, {sum(links.values()):,} bytes",
        f"bulk: {len(plan.tensors) - len(misc)} tensors; misc: {len(misc)}",
        *(f"  {kind}: {nbytes:,} bytes" for kind, nbytes in sorted(kinds.items())),
        *(f"link {a} -> {b}: {nbytes:,} bytes" for (a, b), nbytes in sorted(links.items())),
        *(f"misc {t.name}: {t.misc}" for t in misc),
    ]
    return "\n".join(lines)


def _kind(info: TensorInfo) -> str:
    if info.encoding is Encoding.PLAIN:
        return info.dtype
    return f"blockwise FP8, {info.formula.value if info.formula else '?'} scales"
