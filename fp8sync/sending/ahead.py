"""NaN and Inf in what later portions of a version will send, looked for while nothing is installed yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8sync.plan.boxes import touched_blocks
from fp8sync.recipe import Encoding
from fp8sync.wire.payload import PartReport, Storages, view

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp8sync.plan import Copy

__all__ = ["look_ahead"]


@torch.no_grad()
def look_ahead(storages: Storages, copies: Iterable[Copy]) -> list[PartReport]:
    """Return the copies with NaN or Inf, as packing them would count these."""
    found = []
    for copy in copies:
        bad = _nonfinite(storages, copy)
        if bad:
            found.append(PartReport(copy.tensor, bad))
    return found


def _nonfinite(storages: Storages, copy: Copy) -> int:
    x = view(storages, copy.source_at, copy.shape)
    if copy.encoding is Encoding.PLAIN and copy.source_scale_at is None:
        x = x.to(getattr(torch, copy.dtype))  # what overflows there is infinite
    bad = _count(x)
    if copy.source_scale_at is not None:
        origin = copy.source_origin or (0,) * len(copy.shape)
        blocks = touched_blocks((origin, copy.shape))[1]
        bad += _count(view(storages, copy.source_scale_at, blocks))
    return bad


def _count(x: torch.Tensor) -> int:
    return int((~torch.isfinite(x.float())).sum()) if x.is_floating_point() else 0
