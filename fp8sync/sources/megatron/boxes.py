"""A layout of pieces over a held parameter, as boxes with placements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8sync.manifest import Box, Placement, TensorInfo
from fp8sync.plan.boxes import span
from fp8sync.recipe import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8sync.sources.megatron.held import Held
    from fp8sync.sources.megatron.pieces import Layout, Piece, Shape

__all__ = ["SCALE_SUFFIX", "boxes_of", "infos_of", "misaligned"]

SCALE_SUFFIX = "_scale_inv"
"""A parameter's scales are a storage of their own, named as a checkpoint would name them."""


def infos_of(layout: Layout, held: Held) -> Iterator[TensorInfo]:
    """Yield what this rank knows of the HF tensors that it holds a part of, also an empty one."""
    for tensor, shape in layout.shapes.items():
        yield TensorInfo(tensor, shape, held.dtype, held.encoding, held.formula)


def boxes_of(storage: str, layout: Layout, held: Held) -> Iterator[Box]:
    """Yield one box per piece, in the storage named `storage`."""
    codes = Placement(storage, 0, held.weight.stride())
    for piece in layout.pieces:
        scale_at = None
        if held.scale_inv is not None:
            scales = Placement(storage + SCALE_SUFFIX, 0, held.scale_inv.stride())
            scale_at = scales.at([i // BLOCK for i in piece.local])
        yield Box(piece.tensor, piece.start, piece.shape, codes.at(piece.local), scale_at)


def misaligned(layout: Layout, local: Shape) -> Iterator[str]:
    """Yield one line per HF tensor of which an FP8 parameter holds a part of a block.

    Such a block's scale belongs to more than the piece; sending it would be a wrong scale.
    """
    told = set()
    for piece in layout.pieces:
        full = layout.shapes[piece.tensor]
        if piece.tensor not in told and not _aligned(piece, full, local):
            told.add(piece.tensor)
            yield (
                f"{piece.tensor}: expected FP8 pieces with boundaries at multiples of {BLOCK}, "
                f"found {span((piece.start, piece.shape))} of {list(full)} at "
                f"{span((piece.local, piece.shape))} of the local {list(local)}"
            )


def _aligned(piece: Piece, full: Shape, local: Shape) -> bool:
    for start, at, size, end, local_end in zip(
        piece.start, piece.local, piece.shape, full, local, strict=True
    ):
        if start % BLOCK or at % BLOCK:
            return False
        if size % BLOCK and (start + size != end or at + size != local_end):
            return False
    return True
