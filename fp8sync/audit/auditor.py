"""Does the engine hold what the trainer holds? Digests of both, and the first place where they differ.

`Auditor` runs on trainer rank 0: it takes everyone's digests over the control channel, compares them
unit by unit, and looks closer at the first difference. What a wrong digest is equal to says more:
another tensor's (swapped halves, a wrong shard, a wrong expert), or the same one's some audits ago.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.audit.ledger import units_of
from fp8sync.audit.report import MODULUS, AuditReport, Difference, Entry
from fp8sync.recipe import BLOCK, Encoding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8sync.audit.ledger import Ledger, Unit
    from fp8sync.control import Channel
    from fp8sync.plan import Plan

__all__ = ["Auditor"]

_KINDS = ("weight", "scale_inv")


class Auditor:
    """Compares everyone's digests.

    Args:
        plan: the agreed plan.
        bucket_bytes: as for the transfer; both sides cut the plan alike.
        own: the ledger of trainer rank 0.
        channels: by role (`trainer`, `engine`) and rank.
        before: the trainer's digests at the audit before this one, by unit.
    """

    def __init__(
        self,
        plan: Plan,
        bucket_bytes: int,
        own: Ledger,
        channels: Mapping[tuple[str, int], Channel],
        before: Mapping[str, list[int]],
    ) -> None:
        self._own, self._channels, self._before = own, channels, before
        self._plan = plan
        ranks = sorted(rank for role, rank in channels if role == "engine")
        self._units = [u for rank in ranks for u in units_of(plan, rank, bucket_bytes)]
        self.expected: dict[str, list[int]] = {}

    def run(self) -> AuditReport:
        """Take all digests, compare, look, and let everyone go."""
        held = {place: c.receive("held")["digests"] for place, c in self._channels.items()}
        wanted = dict(self._own.digests())
        found: dict[str, Any] = {}
        for (role, _), digests in held.items():
            (wanted if role == "trainer" else found).update(digests)
        self.expected = {k: v for k, v in wanted.items() if not isinstance(v, str)}
        names = self._names()
        differences: list[Difference] = []
        for unit in self._units:
            want, here = wanted[unit.key], found[unit.key]
            if isinstance(want, str) or isinstance(here, str) or want == here:
                continue
            kinds = [k for k, a, b in zip(_KINDS, want, here, strict=False) if a != b]
            hints = [self._hint(unit, kind, here, names) for kind in kinds]
            made = [_difference(unit, k, h) for k, h in zip(kinds, hints, strict=True)]
            if not differences:
                made[0] = self._look_closer(made[0], unit)
            differences += made
        for channel in self._channels.values():
            channel.send({"type": "look", "unit": None})
        return AuditReport(self._entries(wanted, found), tuple(differences))

    def _entries(self, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[Entry, ...]:
        sums: dict[tuple[str, int], list[Any]] = {}
        for unit in self._units:
            entry = sums.setdefault((unit.part.copy.tensor, unit.rank), [0, 0, ""])
            want, here = wanted[unit.key], found[unit.key]
            reasons = [each for each in (want, here) if isinstance(each, str)]
            if reasons:
                entry[2] = reasons[0]
                continue
            entry[0] = (entry[0] + sum(want)) % MODULUS
            entry[1] = (entry[1] + sum(here)) % MODULUS
        return tuple(Entry(*place, *values) for place, values in sums.items())

    def _names(self) -> dict[tuple[int, str, int], str]:
        """Whose digest is this? By engine rank, kind and digest."""
        names: dict[tuple[int, str, int], str] = {}
        for unit in self._units:
            copy = unit.part.copy
            for kind, value in zip(_KINDS, self.expected.get(unit.key, ()), strict=False):
                start = list(copy.start if kind == "weight" else copy.scale_rect[0])
                names.setdefault((unit.rank, kind, value), f"{copy.tensor} from {start}")
        return names

    def _hint(
        self, unit: Unit, kind: str, here: list[int], names: Mapping[tuple[int, str, int], str]
    ) -> str:
        place = _KINDS.index(kind)
        value = here[place]
        if value == 0:
            return "it holds zeros"
        if self._before.get(unit.key, [None, None])[place : place + 1] == [value]:
            return "it is stale: what the trainer held at the audit before"
        ranks = [unit.rank, *sorted({u.rank for u in self._units} - {unit.rank})]
        for rank in ranks:
            other = names.get((rank, kind, value))
            if other is not None:
                of = "" if rank == unit.rank else f" of engine rank {rank}"
                return f"it holds {other}{of}"
        return ""

    def _look_closer(self, difference: Difference, unit: Unit) -> Difference:
        sides = ("trainer", unit.part.copy.source_rank), ("engine", unit.rank)
        rows = [self._ask(side, unit.key, difference.kind, None) for side in sides]
        row = next((n for n, (a, b) in enumerate(zip(*rows, strict=True)) if a != b), None)
        if row is None:
            return difference
        dtype = self._dtype(unit, difference.kind)
        want, here = (
            _elements(self._ask(side, unit.key, difference.kind, row), dtype) for side in sides
        )
        column = int((want != here).any(dim=1).nonzero()[0])
        values = [each.view(dtype).reshape(-1).float() for each in (want, here)]
        found = _located(difference, unit, (row, column), *(v[column].item() for v in values))
        first = column - (found.coordinate or (0,))[-1] % BLOCK
        block = slice(max(first, 0), first + BLOCK)
        factor = _common_factor(*(v[block] for v in values))
        if difference.hint or unit.part.copy.encoding is Encoding.PLAIN or factor is None:
            return found
        return replace(found, hint=f"its block is {factor:.4g} times the trainer's: a wrong scale")

    def _dtype(self, unit: Unit, kind: str) -> torch.dtype:
        copy = unit.part.copy
        if kind == "scale_inv":
            return torch.float32
        dequantized = copy.encoding is Encoding.BLOCKWISE and copy.scale_at is None
        name = self._plan.tensors[copy.tensor].dtype if dequantized else copy.dtype
        return getattr(torch, name)

    def _ask(self, side: tuple[str, int], key: str, kind: str, row: int | None) -> Any:
        if side == ("trainer", 0):
            return self._own.look(key, kind, row)
        self._channels[side].send({"type": "look", "unit": key, "kind": kind, "row": row})
        return self._channels[side].receive("seen")["seen"]


def _common_factor(expected: torch.Tensor, found: torch.Tensor) -> float | None:
    """The factor between two rows of a block that were rounded to BF16, if there is one."""
    used = expected != 0
    ratios = found[used] / expected[used]
    if not ratios.numel() or (found[~used] != 0).any():
        return None
    factor = ratios.mean()
    # Each side was rounded once, by at most 2^-9 of its value.
    close = ((ratios / factor - 1).abs() <= 2**-7).all()
    return factor.item() if close and factor != 1 else None


def _difference(unit: Unit, kind: str, hint: str) -> Difference:
    copy = unit.part.copy
    start = copy.start if kind == "weight" else copy.scale_rect[0]
    return Difference(copy.tensor, kind, unit.rank, start, hint)


def _elements(row: str, dtype: torch.dtype) -> torch.Tensor:
    """The elements of a row as bytes, uint8 [elements, itemsize]."""
    data = torch.frombuffer(bytearray(base64.b64decode(row)), dtype=torch.uint8)
    return data.view(-1, dtype.itemsize)


def _located(
    difference: Difference, unit: Unit, place: tuple[int, int], expected: float, found: float
) -> Difference:
    copy = unit.part.copy
    shape = copy.shape if difference.kind == "weight" else copy.scale_shape
    flat = place[0] * (shape[-1] if shape else 1) + place[1]
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), shape)] if shape else []
    at = tuple(a + i for a, i in zip(difference.start, index, strict=True))
    return replace(difference, coordinate=at, expected=expected, found=found)
