"""One copy: a rectangle of one HF tensor, from one rank's storage to another's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fp8sync.manifest import ITEMSIZE, Placement
from fp8sync.plan.boxes import Rect, touched_blocks
from fp8sync.recipe import BLOCK, Encoding

if TYPE_CHECKING:
    from fp8sync.recipe import Formula

__all__ = ["Copy", "carried_blocks"]


@dataclass(frozen=True, slots=True)
class Copy:
    """One rectangle of one HF tensor, from one rank's storage to another's.

    `dtype` is the element type on the wire: the destination's for plain tensors, `float8_e4m3fn`
    for blockwise ones, whose float32 scale_inv travels in the same bucket.

    A blockwise copy may begin or end inside a block (`cut`) where the source's own boxes do. It is
    then quantized with the amax of the whole block (`Plan.amax`), and a block's scale_inv is carried
    by the one copy that holds the block's first element: `scale_rect` says which blocks those are.
    A destination without scales dequantizes each copy by itself and is given all it touches.

    With `source_scale_at` the source holds an FP8 pair. Its codes and scales are passed through unless
    there is a `source_origin`, the position of the first element within the source's own block: then
    the pair is dequantized, and quantized anew where the copy is blockwise.

    A copy that other engine ranks of the node want as well is sent to one of them: `onward` are those that
    its destination hands it on to, and with `via` it is the destination that gets it from that rank.
    """

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    encoding: Encoding
    formula: Formula | None
    source_rank: int
    source_at: Placement
    destination_rank: int
    at: Placement
    scale_at: Placement | None
    source_scale_at: Placement | None = None
    source_origin: tuple[int, ...] = ()
    via: int | None = None
    onward: tuple[int, ...] = ()

    @property
    def rect(self) -> Rect:
        """(start, shape)."""
        return self.start, self.shape

    @property
    def weight_bytes(self) -> int:
        """Bytes of the elements on the wire."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def origin(self) -> tuple[int, ...]:
        """Position of the first element within its block, by dim."""
        return tuple(a % BLOCK for a in self.start)

    @property
    def scale_rect(self) -> Rect:
        """The blocks whose scale_inv this copy carries, in blocks of the whole tensor."""
        return carried_blocks(self.rect, whole_grid=self.scale_at is None)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scale_inv rectangle carried; empty product where there is none."""
        return self.scale_rect[1] if self.encoding is Encoding.BLOCKWISE else (0,)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scale_inv on the wire."""
        return 4 * math.prod(self.scale_shape)

    def to_json(self) -> list[Any]:
        """Return the copy as JSON-able data, the form that is digested.

        `source_scale_at` is appended where there is one, then `source_origin`, then what is forwarded.
        """
        data: list[Any] = [
            self.tensor,
            list(self.start),
            list(self.shape),
            self.dtype,
            self.encoding.value,
            self.formula and self.formula.value,
            self.source_rank,
            self.source_at.to_json(),
            self.destination_rank,
            self.at.to_json(),
            self.scale_at and self.scale_at.to_json(),
        ]
        if self.source_scale_at is not None:
            data.append(self.source_scale_at.to_json())
        if self.source_origin:
            data.append(list(self.source_origin))
        if self.via is not None:
            data.append({"via": self.via})
        if self.onward:
            data.append({"onward": list(self.onward)})
        return data


@lru_cache(1 << 10)  # experts are many, and alike
def carried_blocks(rect: Rect, *, whole_grid: bool) -> Rect:
    """Return the blocks whose first element lies in `rect`, or with `whole_grid` all it touches."""
    if whole_grid:
        return touched_blocks(rect)
    first = tuple(-(-a // BLOCK) for a in rect[0])
    return first, tuple(
        -(-(a + n) // BLOCK) - f for a, n, f in zip(rect[0], rect[1], first, strict=True)
    )
