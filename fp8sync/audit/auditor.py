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

from fp8sync.audit.report import MODULUS, AuditReport, Difference, Entry
from fp8sync.audit.scales import KnownScales, common_factor, whose_scale
from fp8sync.audit.units import units_of
from fp8sync.recipe import BLOCK, Encoding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fp8sync.audit.ledger import Ledger
    from fp8sync.audit.units import Unit
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
        it = "it" if kind == "weight" else f"its {kind}"
        if value == 0:
            return f"{it} holds zeros"
        if self._before.get(unit.key, [None, None])[place : place + 1] == [value]:
            return f"{it} is stale: what the trainer held at the audit before"
        ranks = [unit.rank, *sorted({u.rank for u in self._units} - {unit.rank})]
        for rank in ranks:
            other = names.get((rank, kind, value))
            if other is not None:
                of = "" if rank == unit.rank else f" of engine rank {rank}"
                return f"{it} holds {other}{of}"
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
        column = _first_difference(want, here)
        values = want[column].float().item(), here[column].float().item()
        found = _located(difference, unit, (row, column), *values)
        if difference.hint or unit.part.copy.encoding is Encoding.PLAIN:
            return found
        return replace(found, hint=self._scale_hint(found, unit, (row, column), want, here))

    def _scale_hint(
        self,
        difference: Difference,
        unit: Unit,
        place: tuple[int, int],
        want: torch.Tensor,
        here: torch.Tensor,
    ) -> str:
        """Say what is wrong with the scale of the block at `place`, (row, column) of the unit."""
        at, (row, column) = difference.coordinate or (0, 0), place
        codes = None
        if difference.kind == "scale_inv":
            block, within = (at[0], at[1]), slice(column, column + 1)
        elif self._dtype(unit, "weight").itemsize == 1:
            return ""  # the codes of a pair differ, whatever its scales
        else:
            block = at[0] // BLOCK, at[1] // BLOCK
            within = slice(max(column - at[1] % BLOCK, 0), column - at[1] % BLOCK + BLOCK)
            source = "trainer", unit.part.copy.source_rank
            codes = _elements(self._ask(source, unit.key, "codes", row), torch.float8_e4m3fn)
            codes = codes[within]
        name = whose_scale(self._known_scales(unit), block, codes, here[within])
        factor = None if name else common_factor(want[within].float(), here[within].float())
        return f"its block is {factor:.4g} times the trainer's: a wrong scale" if factor else name

    def _known_scales(self, unit: Unit) -> Iterator[KnownScales]:
        """The trainer's scales of the whole tensor, as far as this engine rank holds it."""
        for other in self._units:
            copy = other.part.copy
            if copy.tensor == unit.part.copy.tensor and other.key in self.expected:
                side = "trainer", copy.source_rank
                yield KnownScales(other, *self._ask(side, other.key, "scales", None))

    def _dtype(self, unit: Unit, kind: str) -> torch.dtype:
        copy = unit.part.copy
        if kind == "scale_inv" or (self._plan.is_cut(copy) and copy.scale_at is not None):
            return torch.float32
        dequantized = copy.encoding is Encoding.BLOCKWISE and copy.scale_at is None
        name = self._plan.tensors[copy.tensor].dtype if dequantized else copy.dtype
        return getattr(torch, name)

    def _ask(self, side: tuple[str, int], key: str, kind: str, row: int | None) -> Any:
        if side == ("trainer", 0):
            return self._own.look(key, kind, row)
        self._channels[side].send({"type": "look", "unit": key, "kind": kind, "row": row})
        return self._channels[side].receive("seen")["seen"]


def _difference(unit: Unit, kind: str, hint: str) -> Difference:
    copy = unit.part.copy
    start = copy.start if kind == "weight" else copy.scale_rect[0]
    return Difference(copy.tensor, kind, unit.rank, start, hint)


def _elements(row: str, dtype: torch.dtype) -> torch.Tensor:
    """The elements of a row."""
    return torch.frombuffer(bytearray(base64.b64decode(row)), dtype=torch.uint8).view(dtype)


def _first_difference(a: torch.Tensor, b: torch.Tensor) -> int:
    """The first element that differs in its bytes: NaN equals itself, and E4M3 needs no arithmetic."""
    bytes_of = (each.view(torch.uint8).view(-1, each.itemsize) for each in (a, b))
    return int(torch.ne(*bytes_of).any(dim=1).nonzero()[0])


def _located(
    difference: Difference, unit: Unit, place: tuple[int, int], expected: float, found: float
) -> Difference:
    copy = unit.part.copy
    shape = copy.shape if difference.kind == "weight" else copy.scale_shape
    flat = place[0] * (shape[-1] if shape else 1) + place[1]
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), shape)] if shape else []
    at = tuple(a + i for a, i in zip(difference.start, index, strict=True))
    return replace(difference, coordinate=at, expected=expected, found=found)
