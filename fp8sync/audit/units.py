"""What an audit compares: the parts of a plan's buckets, each in a form that both sides can bring it into.

In canonical form a re-encoding that changes no value changes no byte, and a negative zero is a zero. An
FP8 pair of whole blocks is compared as a pair. One that begins or ends inside a block has no canonical
pair of its own, and is compared by its values in float32: codes times scale_inv, rounded once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8sync.plan import MISC, Part, Plan, fill_buckets
from fp8sync_kernels import canonical_pair, digest

if TYPE_CHECKING:
    from fp8sync.manifest import TensorInfo

__all__ = [
    "Held",
    "Unit",
    "Unreadable",
    "as_kv_scale",
    "check_readable",
    "is_kv_scale",
    "rows_of",
    "units_of",
]


_KV_SCALES = {"k_scale", "v_scale", "q_scale", "prob_scale"}


class Unreadable(Exception):
    """What is held of a unit cannot be read back; says why."""


@dataclass(frozen=True)
class Held:
    """A unit in canonical form: elements or, for FP8 pairs, codes and scale_inv.

    A trainer rank adds what it made the elements of, as (codes, scale_inv of every block touched).
    """

    weight: torch.Tensor
    scale_inv: torch.Tensor | None = None
    made_of: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, scale_inv: torch.Tensor | None) -> Held:
        """Bring a unit into canonical form."""
        if scale_inv is not None:
            return cls(*canonical_pair(weight, scale_inv))
        return cls(weight + 0 if weight.is_floating_point() else weight)

    def digests(self) -> list[int]:
        """Return the digest of the elements and, for a pair, that of scale_inv."""
        both = (self.weight, self.scale_inv)
        return [digest(rows_of(held).reshape(-1)) for held in both if held is not None]


@dataclass(frozen=True)
class Unit:
    """One part of what a destination rank is to hold.

    Both ranks and `number`, counted for the two of them, name it on either side.
    """

    rank: int
    number: int
    part: Part

    @property
    def key(self) -> str:
        """The unit's name on the control channel."""
        return f"{self.rank}:{self.part.copy.source_rank}:{self.number}"


def units_of(plan: Plan, rank: int, bucket_bytes: int) -> list[Unit]:
    """Return what one destination rank is to hold, in the plan's order."""
    counted: Counter[int] = Counter()
    units = []
    for bucket in fill_buckets(plan.to_rank(rank), bucket_bytes):
        for part in bucket.parts:
            units.append(Unit(rank, counted[bucket.source_rank], part))
            counted[bucket.source_rank] += 1
    return units


def check_readable(plan: Plan, unit: Unit) -> None:
    """Raise `Unreadable` for what has no form that both sides know."""
    copy = unit.part.copy
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


def rows_of(held: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 [rows, bytes of a row]; a vector is one row."""
    flat = held.contiguous().reshape(-1, held.shape[-1] if held.dim() else 1)
    return flat.view(torch.uint8)
