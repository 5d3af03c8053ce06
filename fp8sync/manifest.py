"""What one side has, as plain data: boxes of Hugging Face tensors in local storages.

A *box* says: this rectangle of that HF tensor lives in this strided rectangle of one rank's local
storage. Both sides describe themselves in boxes; nothing else about their layouts is ever needed.
The JSON written here is a frozen interface (docs/wire-format.md, tests/golden).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fp8sync.recipe import Encoding, Formula

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["ITEMSIZE", "Box", "Manifest", "Placement", "TensorInfo", "canonical_json"]

ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes per element of every dtype that can travel, by its torch name."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A strided rectangle of a named local storage.

    Args:
        storage: a key of `Source.storages`.
        offset: elements from the storage's first to the rectangle's.
        strides: elements from one index to the next, for each dim of the rectangle.

    Examples:
        >>> Placement("qkv", 0, (512, 1)).at((128, 0))
        Placement(storage='qkv', offset=65536, strides=(512, 1))
    """

    storage: str
    offset: int
    strides: tuple[int, ...]

    def at(self, index: Sequence[int]) -> Placement:
        """Return the placement of the sub-rectangle that starts at `index` within this one."""
        moved = sum(i * s for i, s in zip(index, self.strides, strict=True))
        return Placement(self.storage, self.offset + moved, self.strides)

    def to_json(self) -> list[Any]:
        """Return `[storage, offset, [strides]]`."""
        return [self.storage, self.offset, list(self.strides)]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Placement:
        """Rebuild a placement from `to_json`."""
        return cls(data[0], data[1], tuple(data[2]))


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of an HF tensor and where one rank keeps it.

    Args:
        tensor: HF parameter name.
        start: first element in the HF tensor.
        shape: elements of each dim.
        at: where they lie.
        scale_at: the rectangle of `weight_scale_inv` that belongs to it (index = element index // 128),
            where the side keeps one.
        scale_origin: given by a source whose blocks are not the HF tensor's (a shard that was quantized by
            itself): where the rectangle's first element lies within the block of the scale at `scale_at`.

    Examples:
        >>> at = Placement("qkv", 65536, (512, 1))
        >>> box = Box("model.layers.0.self_attn.k_proj.weight", (0, 0), (64, 512), at)
    """

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    at: Placement
    scale_at: Placement | None = None
    scale_origin: tuple[int, ...] = ()

    def to_json(self) -> list[Any]:
        """Return `[tensor, [start], [shape], at, scale_at]`; then `[scale_origin]`, if there is one."""
        scale = self.scale_at and self.scale_at.to_json()
        data = [self.tensor, list(self.start), list(self.shape), self.at.to_json(), scale]
        return [*data, list(self.scale_origin)] if self.scale_origin else data

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Box:
        """Rebuild a box from `to_json`."""
        scale = Placement.from_json(data[4]) if data[4] else None
        origin = tuple(data[5]) if len(data) > 5 else ()
        at = Placement.from_json(data[3])
        return cls(data[0], tuple(data[1]), tuple(data[2]), at, scale, origin)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One HF tensor as a side holds it (source) or wants it (destination).

    Args:
        name: HF parameter name.
        shape: full shape of the HF tensor.
        dtype: torch dtype name of the elements in the boxes' storages.
        encoding: how the side holds or wants it.
        formula: for blockwise encoding, the scale formula the side holds or wants.
        misc: empty for the bulk path; otherwise the reason why the whole tensor goes through the
            engine's own loader.
        unused: the reason why the side wants nothing of it, and has no box of it.

    Examples:
        >>> TensorInfo("lm_head.weight", (256, 128), "bfloat16").numel
        32768
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: Encoding = Encoding.PLAIN
    formula: Formula | None = None
    misc: str = ""
    unused: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def to_json(self) -> list[Any]:
        """Return `[name, [shape], dtype, encoding, formula, misc]`; then `unused`, if it is."""
        formula = self.formula and self.formula.value
        data = [self.name, list(self.shape), self.dtype, self.encoding.value, formula, self.misc]
        return [*data, self.unused] if self.unused else data

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> TensorInfo:
        """Rebuild a tensor's description from `to_json`."""
        formula = Formula(data[4]) if data[4] else None
        encoding, unused = Encoding(data[3]), data[6] if len(data) > 6 else ""
        return cls(data[0], tuple(data[1]), data[2], encoding, formula, data[5], unused)


@dataclass(frozen=True)
class Manifest:
    """All boxes of one side, by rank, and the tensors they are boxes of.

    Args:
        tensors: by name.
        ranks: boxes by rank.

    Examples:
        >>> info = TensorInfo("model.norm.weight", (128,), "bfloat16")
        >>> box = Box(info.name, (0,), (128,), Placement("norm", 0, (1,)))
        >>> manifest = Manifest.of([info], {0: [box]})
        >>> Manifest.from_json(manifest.to_json()) == manifest
        True
    """

    tensors: Mapping[str, TensorInfo]
    ranks: Mapping[int, tuple[Box, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Iterable[TensorInfo], ranks: Mapping[int, Sequence[Box]]) -> Manifest:
        """Build a manifest from unordered parts; tensors keep the order given."""
        return cls({t.name: t for t in tensors}, {r: tuple(b) for r, b in sorted(ranks.items())})

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON-able data."""
        return {
            "tensors": [t.to_json() for t in self.tensors.values()],
            "ranks": {
                str(rank): [b.to_json() for b in boxes] for rank, boxes in self.ranks.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Rebuild a manifest from `to_json`."""
        ranks = {int(r): [Box.from_json(b) for b in boxes] for r, boxes in data["ranks"].items()}
        return cls.of((TensorInfo.from_json(t) for t in data["tensors"]), ranks)

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()


def canonical_json(data: Any) -> bytes:
    """Return `data` as JSON with sorted keys and no spaces, in UTF-8."""
    return _CANONICAL.encode(data).encode()


# `json.dumps` would make one for every copy that is digested.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
