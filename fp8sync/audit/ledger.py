"""What one rank, of either side, holds of a plan: digests of canonical forms, and rows to look at.

Both sides cut the plan into the same units, the parts of its buckets. A trainer rank reads a unit as it
would arrive; a worker reads it out of its live memory (`engines.vllm.live`). In canonical form a
re-encoding that changes no value changes no byte, and a negative zero is a zero.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.manifest import Placement
from fp8sync.plan import MISC, Bucket, Part, Plan, fill_buckets
from fp8sync.recipe import Encoding
from fp8sync.wire.payload import Storages, pack, unpack
from fp8sync_kernels import canonical_pair, digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fp8sync.control import Channel
    from fp8sync.manifest import TensorInfo

__all__ = [
    "Held",
    "Ledger",
    "Unit",
    "Unreadable",
    "as_kv_scale",
    "check_readable",
    "is_kv_scale",
    "trainer_ledger",
    "units_of",
]


_KV_SCALES = {"k_scale", "v_scale", "q_scale", "prob_scale"}


class Unreadable(Exception):
    """What is held of a unit cannot be read back; says why."""


@dataclass(frozen=True)
class Held:
    """A unit in canonical form: elements or, for FP8 pairs, codes and scale_inv."""

    weight: torch.Tensor
    scale_inv: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, scale_inv: torch.Tensor | None) -> Held:
        """Bring a unit into canonical form."""
        if scale_inv is not None:
            return cls(*canonical_pair(weight, scale_inv))
        return cls(weight + 0 if weight.is_floating_point() else weight)

    def digests(self) -> list[int]:
        """Return the digest of the elements and, for a pair, that of scale_inv."""
        both = (self.weight, self.scale_inv)
        return [digest(_rows(held).reshape(-1)) for held in both if held is not None]


@dataclass(frozen=True)
class Unit:
    """One part of what a destination rank is to hold; `rank` and `number` name it on both sides."""

    rank: int
    number: int
    part: Part

    @property
    def key(self) -> str:
        """The unit's name on the control channel."""
        return f"{self.rank}:{self.number}"


def units_of(plan: Plan, rank: int, bucket_bytes: int) -> list[Unit]:
    """Return what one destination rank is to hold, in the plan's order."""
    parts = [p for bucket in fill_buckets(plan.to_rank(rank), bucket_bytes) for p in bucket.parts]
    return [Unit(rank, number, part) for number, part in enumerate(parts)]


class Ledger:
    """What one rank holds of its units.

    Args:
        units: of this rank.
        read: returns a unit as it is held; raises `Unreadable`.
    """

    def __init__(self, units: Iterable[Unit], read: Callable[[Unit], Held]) -> None:
        self._units = {unit.key: unit for unit in units}
        self._read = read

    def digests(self) -> dict[str, list[int] | str]:
        """Return digests by unit, or why there are none."""
        found: dict[str, list[int] | str] = {}
        for key, unit in self._units.items():
            try:
                found[key] = self._read(unit).digests()
            except Unreadable as error:  # noqa: PERF203
                found[key] = str(error)
        return found

    def look(self, key: str, kind: str, row: int | None) -> list[int] | str:
        """Return the digest of every row of a unit, or the bytes of one row in base64."""
        rows = _rows(getattr(self._read(self._units[key]), kind))
        if row is None:
            return [digest(each) for each in rows]
        return base64.b64encode(rows[row].cpu().numpy().tobytes()).decode()

    def answer(self, channel: Channel) -> None:
        """Tell the digests to whoever audits, and then what it asks to look at."""
        channel.send({"type": "held", "digests": self.digests()})
        while (question := channel.receive("look"))["unit"] is not None:
            seen = self.look(question["unit"], question["kind"], question["row"])
            channel.send({"type": "seen", "seen": seen})


def check_readable(plan: Plan, unit: Unit) -> None:
    """Raise `Unreadable` for what has no canonical form that both sides know."""
    copy = unit.part.copy
    if plan.is_cut(copy):
        raise Unreadable("the trainer's shards cut its blocks")
    info = plan.tensors[copy.tensor]
    if info.misc and not is_kv_scale(info):
        raise Unreadable(f"loaded by the engine itself: {info.misc}")
    if copy.scale_at is not None and copy.scale_at.storage.startswith(MISC):
        raise Unreadable("its scales were loaded by the engine itself")


def is_kv_scale(info: TensorInfo) -> bool:
    """Whether this is a scale of an FP8 KV cache, which an engine keeps as it is."""
    return not info.shape and info.name.rpartition(".")[2] in _KV_SCALES


def as_kv_scale(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a KV-cache scale as vLLM's parameters do, which have the model's dtype: BF16."""
    return value.to(torch.bfloat16).to(dtype)


def trainer_ledger(storages: Storages, rank: int, plan: Plan, bucket_bytes: int) -> Ledger:
    """Return the ledger of a trainer rank: its weights as they are now, in the engine's format."""
    ranks = sorted({copy.destination_rank for copy in plan.copies})
    units = [unit for r in ranks for unit in units_of(plan, r, bucket_bytes)]

    def read(unit: Unit) -> Held:
        check_readable(plan, unit)
        weight, scale_inv = _as_it_arrives(unit.part, plan, storages)
        if is_kv_scale(plan.tensors[unit.part.copy.tensor]):
            weight = as_kv_scale(weight, weight.dtype)
        return Held.of(weight, scale_inv)

    return Ledger([u for u in units if u.part.copy.source_rank == rank], read)


@torch.no_grad()
def _as_it_arrives(
    part: Part, plan: Plan, storages: Storages
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pack one part and unpack it, by the code that a refit uses."""
    copy = part.copy
    device = storages[copy.source_at.storage].device
    plain = copy.encoding is Encoding.PLAIN
    scale_offset = -1 if plain else part.scale_offset - part.offset
    nbytes = copy.weight_bytes if plain else scale_offset + copy.scale_bytes
    dtype = copy.dtype
    home: dict[str, Any] = {"at": _contiguous("weight", copy.shape)}
    staging: dict[str, torch.Tensor] = {}
    if copy.scale_at is not None:
        home["scale_at"] = _contiguous("scale_inv", copy.scale_shape)
        staging["scale_inv"] = torch.empty(copy.scale_shape, device=device)
    elif not plain:
        dtype = plan.tensors[copy.tensor].dtype
    staging["weight"] = torch.empty(copy.shape, dtype=getattr(torch, dtype), device=device)
    moved = Part(replace(copy, **home), 0, scale_offset)
    alone = Bucket(0, copy.source_rank, copy.destination_rank, (moved,), nbytes)
    payload = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    pack(alone, storages, payload)
    unpack(alone, payload, staging)
    return staging["weight"], staging.get("scale_inv")


def _contiguous(storage: str, shape: tuple[int, ...]) -> Placement:
    strides = torch.empty(shape, device="meta").stride()
    return Placement(storage, 0, tuple(strides))


def _rows(held: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 [rows, bytes of a row]; a vector is one row."""
    flat = held.contiguous().reshape(-1, held.shape[-1] if held.dim() else 1)
    return flat.view(torch.uint8)
