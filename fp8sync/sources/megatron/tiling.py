"""Do all ranks of a trainer together hold every element of every tensor, exactly once?"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from fp8sync.errors import UnsupportedLayout
from fp8sync.plan.boxes import Rect, overlapping, span, volume

if TYPE_CHECKING:
    from fp8sync.manifest import Manifest

__all__ = ["check_tiling"]


def check_tiling(manifest: Manifest) -> None:
    """Check that the boxes of all ranks tile every tensor exactly once.

    Ranks with the same rectangle are replicas of it and count once.

    Raises:
        UnsupportedLayout: naming every tensor with a hole or with rectangles that overlap.
    """
    rects: dict[str, set[Rect]] = defaultdict(set)
    for boxes in manifest.ranks.values():
        for box in boxes:
            rects[box.tensor].add((box.start, box.shape))
    faults = []
    for name, info in manifest.tensors.items():
        found = sorted(rects[name])
        held = sum(volume(rect) for rect in found)
        clash = next(iter(overlapping(found)), None)
        if clash:
            both = " and ".join(span(found[i]) for i in clash)
            faults.append(f"{name}: expected every element once, found {both}, which overlap")
        elif held != info.numel:
            faults.append(
                f"{name}: expected {info.numel} elements of {list(info.shape)}, "
                f"found {held} on all trainer ranks together"
            )
    if faults:
        raise UnsupportedLayout("the trainer's ranks do not hold whole tensors", faults)
