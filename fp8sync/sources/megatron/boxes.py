"""A layout of pieces over a held parameter, as boxes with placements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8sync.manifest import Box, Placement, TensorInfo
from fp8sync.recipe import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8sync.sources.megatron.held import Held
    from fp8sync.sources.megatron.pieces import Layout

__all__ = ["SCALE_SUFFIX", "boxes_of", "infos_of"]

SCALE_SUFFIX = "_scale_inv"
"""A parameter's scales are a storage of their own, named as a checkpoint would name them."""


def infos_of(layout: Layout, held: Held) -> Iterator[TensorInfo]:
    """Yield what this rank knows of the HF tensors that it holds a part of, also an empty one."""
    for tensor, shape in layout.shapes.items():
        yield TensorInfo(tensor, shape, held.dtype, held.encoding, held.formula)


def boxes_of(storage: str, layout: Layout, held: Held) -> Iterator[Box]:
    """Yield one box per piece, in the storage named `storage`.

    A parameter's blocks begin at its own first row and column. Where those are not the HF tensor's
    blocks, the box says where in its first block it begins.
    """
    codes = Placement(storage, 0, held.weight.stride())
    for piece in layout.pieces:
        scale_at = None
        origin: tuple[int, ...] = ()
        if held.scale_inv is not None:
            scales = Placement(storage + SCALE_SUFFIX, 0, held.scale_inv.stride())
            scale_at = scales.at([i // BLOCK for i in piece.local])
            if any((i - a) % BLOCK for i, a in zip(piece.local, piece.start, strict=True)):
                origin = tuple(i % BLOCK for i in piece.local)
        yield Box(piece.tensor, piece.start, piece.shape, codes.at(piece.local), scale_at, origin)
