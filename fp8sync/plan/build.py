"""The plan: every overlap of a source box with a destination box is one copy.

Pure data from pure data: no tensors, no devices, the same on every rank. Its digest, one per
destination rank, is compared by both sides before a byte moves.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8sync.errors import TensorMismatch, UnsupportedLayout
from fp8sync.manifest import ITEMSIZE, Box, Manifest, Placement, TensorInfo, canonical_json
from fp8sync.plan.boxes import Rect, block_shape, misaligned_dim, overlap, overlapping, volume
from fp8sync.recipe import BLOCK, Encoding, Formula

__all__ = ["Copy", "Plan", "build_plan"]


@dataclass(frozen=True, slots=True)
class Copy:
    """One rectangle of one HF tensor, from one rank's storage to another's.

    `dtype` is the element type on the wire: the destination's for plain tensors, `float8_e4m3fn`
    for blockwise ones, whose float32 scale_inv travels in the same bucket.
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

    @property
    def weight_bytes(self) -> int:
        """Bytes of the elements on the wire."""
        return volume((self.start, self.shape)) * ITEMSIZE[self.dtype]

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scale_inv rectangle; empty product where there is none."""
        return block_shape(self.shape) if self.encoding is Encoding.BLOCKWISE else (0,)

    def to_json(self) -> list[Any]:
        """Return the copy as JSON-able data, the form that is digested."""
        return [
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


@dataclass(frozen=True)
class Plan:
    """All copies of a refit, in wire order, and the tensors they carry."""

    tensors: Mapping[str, TensorInfo]
    copies: tuple[Copy, ...]

    def to_rank(self, destination_rank: int) -> tuple[Copy, ...]:
        """Return the copies that arrive at one destination rank."""
        return tuple(c for c in self.copies if c.destination_rank == destination_rank)

    def digests(self, destination_rank: int) -> dict[str, str]:
        """Return one SHA-256 per tensor over the copies that arrive at `destination_rank`."""
        hashes: dict[str, Any] = defaultdict(hashlib.sha256)
        for copy in self.to_rank(destination_rank):
            hashes[copy.tensor].update(canonical_json(copy.to_json()))
        return {name: h.hexdigest() for name, h in hashes.items()}

    def digest(self, destination_rank: int) -> str:
        """Return the SHA-256 of `digests(destination_rank)`, in hex."""
        items = list(self.digests(destination_rank).items())
        return hashlib.sha256(canonical_json(items)).hexdigest()


def build_plan(source: Manifest, destination: Manifest) -> Plan:
    """Intersect two manifests.

    Args:
        source: the trainer's boxes, all ranks.
        destination: the engine's boxes, of one rank or of all.

    Raises:
        TensorMismatch: a tensor is missing on one side, or shapes differ.
        UnsupportedLayout: source boxes leave a hole, or a copy would cut a 128-block.
    """
    _check_tensors(source, destination)
    held = _boxes_by_tensor(source)
    copies: list[Copy] = []
    faults: list[str] = []
    for rank, boxes in destination.ranks.items():
        for number, box in enumerate(boxes):
            info = destination.tensors[box.tensor]
            found = list(_fill(box, held[box.tensor], rank + number))
            if sum(volume(part) for part, _, _ in found) != volume((box.start, box.shape)):
                faults.append(
                    f"{box.tensor}: engine rank {rank} needs {_span(box.start, box.shape)}; "
                    "the trainer's boxes do not cover it exactly once"
                )
            for part, source_rank, owner in found:
                if info.encoding is Encoding.BLOCKWISE:
                    dim = misaligned_dim(part, info.shape)
                    if dim is not None:
                        faults.append(
                            f"{box.tensor}: copy {_span(*part)} from rank {source_rank} to engine "
                            f"rank {rank} cuts a {BLOCK}-block in dim {dim}"
                        )
                        continue
                copies.append(_copy(part, source_rank, owner, rank, box, info))
    if faults:
        raise UnsupportedLayout("the layouts cannot be joined exactly", faults)
    order = sorted(range(len(copies)), key=lambda i: (_route(copies[i]), i))
    return Plan(dict(destination.tensors), tuple(copies[i] for i in order))


def _route(copy: Copy) -> tuple[int, int]:
    return copy.destination_rank, copy.source_rank


def _check_tensors(source: Manifest, destination: Manifest) -> None:
    faults = []
    for name, info in destination.tensors.items():
        held = source.tensors.get(name)
        if held is None:
            faults.append(f"{name}: the engine expects it, the trainer does not have it")
        elif held.shape != info.shape:
            faults.append(f"{name}: trainer shape {held.shape}, engine expects {info.shape}")
    faults += [
        f"{name}: the trainer has it, the engine does not take it"
        for name in source.tensors
        if name not in destination.tensors
    ]
    if faults:
        raise TensorMismatch("trainer and engine hold different tensors", faults)


def _boxes_by_tensor(source: Manifest) -> dict[str, list[tuple[int, Box]]]:
    held: dict[str, list[tuple[int, Box]]] = defaultdict(list)
    for rank, boxes in source.ranks.items():
        for box in boxes:
            held[box.tensor].append((rank, box))
    return held


def _fill(
    wanted: Box, held: Sequence[tuple[int, Box]], turn: int
) -> Iterator[tuple[Rect, int, Box]]:
    """Yield the parts of `wanted`, each from one owner; replicas take turns."""
    replicas: dict[Rect, list[tuple[int, Box]]] = defaultdict(list)
    for rank, box in held:
        part = overlap((wanted.start, wanted.shape), (box.start, box.shape))
        if part is not None:
            replicas[part].append((rank, box))
    parts = list(replicas)
    if any(overlapping(parts)):
        # Replicas cut differently: keep a greedy set of parts that do not overlap.
        parts = _disjoint(parts)
    for part in parts:
        rank, box = replicas[part][turn % len(replicas[part])]
        yield part, rank, box


def _disjoint(parts: Sequence[Rect]) -> list[Rect]:
    chosen: list[Rect] = []
    for part in sorted(parts, key=volume, reverse=True):
        if not any(overlap(part, other) for other in chosen):
            chosen.append(part)
    return sorted(chosen)


def _copy(part: Rect, source_rank: int, owner: Box, rank: int, box: Box, info: TensorInfo) -> Copy:
    start, shape = part
    within = [a - b for a, b in zip(start, box.start, strict=True)]
    blockwise = info.encoding is Encoding.BLOCKWISE
    return Copy(
        tensor=box.tensor,
        start=start,
        shape=shape,
        dtype="float8_e4m3fn" if blockwise else info.dtype,
        encoding=info.encoding,
        formula=info.formula,
        source_rank=source_rank,
        source_at=owner.at.at([a - b for a, b in zip(start, owner.start, strict=True)]),
        destination_rank=rank,
        at=box.at.at(within),
        scale_at=box.scale_at and box.scale_at.at([i // BLOCK for i in within]),
    )


def _span(start: Sequence[int], shape: Sequence[int]) -> str:
    return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(start, shape, strict=True)) + "]"
