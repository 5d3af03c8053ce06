"""Does the engine hold what the trainer holds? Digests of both, and the first place where they differ.

`Auditor` runs on trainer rank 0: it takes everyone's digests over the control channel, compares them
unit by unit, and looks closer at the first difference. What a wrong digest is equal to says more:
another tensor's (swapped halves, a wrong shard, a wrong expert), or the same one's some audits ago.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.ledger import units_of
from fp8sync.recipe import BLOCK, Encoding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8sync.control import Channel
    from fp8sync.ledger import Ledger, Unit
    from fp8sync.plan import Plan

__all__ = ["AuditReport", "Auditor", "Difference", "Entry", "layer_of"]

_MODULUS = 1 << 64
_KINDS = ("weight", "scale_inv")


@dataclass(frozen=True)
class Entry:
    """One tensor on one engine rank: sums of its units' digests, modulo 2^64.

    `unread` says why a part of it could not be compared; digests are of the rest.
    """

    tensor: str
    rank: int
    trainer: int
    engine: int
    unread: str = ""


@dataclass(frozen=True)
class Difference:
    """A tensor that an engine rank holds otherwise than the trainer.

    Args:
        tensor: HF parameter name.
        kind: `weight` or `scale_inv`.
        rank: of the engine.
        start: first element of the HF tensor (block, for scale_inv) of the rectangle.
        hint: what the engine holds instead, where its digest tells.
        coordinate: the first element (or block) that differs; of the first difference only.
        expected: its value in the trainer, in the engine's format.
        found: its value in the engine.
    """

    tensor: str
    kind: str
    rank: int
    start: tuple[int, ...]
    hint: str = ""
    coordinate: tuple[int, ...] | None = None
    expected: float | None = None
    found: float | None = None

    def __str__(self) -> str:
        text = f"{self.tensor}, {self.kind} from {list(self.start)} (engine rank {self.rank})"
        if self.coordinate is not None:
            text += f": at {list(self.coordinate)} expected {self.expected!r}, found {self.found!r}"
        return f"{text}; {self.hint}" if self.hint else text


@dataclass(frozen=True)
class AuditReport:
    """What an audit found; every tensor on every engine rank has an entry."""

    entries: tuple[Entry, ...]
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing that could be read differs."""
        return not self.differences

    @property
    def unread(self) -> dict[str, str]:
        """Tensors that could not be compared whole, with the reason."""
        return {e.tensor: e.unread for e in self.entries if e.unread}

    def layers(self) -> dict[str, tuple[int, int]]:
        """Return by layer (trainer's digest, engine's digest), over all ranks."""
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for entry in self.entries:
            both = sums[layer_of(entry.tensor)]
            both[0] = (both[0] + entry.trainer) % _MODULUS
            both[1] = (both[1] + entry.engine) % _MODULUS
        return {layer: (trainer, engine) for layer, (trainer, engine) in sums.items()}

    def explain(self) -> str:
        """Return layers, differences and what was not read, as text."""
        lines = [f"{'layer':24} {'trainer':>16} {'engine':>16}"]
        for layer, (trainer, engine) in self.layers().items():
            verdict = "equal" if trainer == engine else "DIFFERS"
            lines.append(f"{layer:24} {trainer:016x} {engine:016x} {verdict}")
        lines += [f"differs: {each}" for each in self.differences]
        lines += [f"not read: {name}: {reason}" for name, reason in self.unread.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return {
            "entries": [asdict(e) for e in self.entries],
            "differences": [asdict(d) for d in self.differences],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AuditReport:
        """Rebuild a report from `to_json`."""
        entries = tuple(Entry(**row) for row in data["entries"])
        return cls(entries, tuple(_difference_of(row) for row in data["differences"]))


def _difference_of(row: Mapping[str, Any]) -> Difference:
    at = row["coordinate"]
    places = {"start": tuple(row["start"]), "coordinate": None if at is None else tuple(at)}
    return Difference(**{**row, **places})


def layer_of(tensor: str) -> str:
    """Return the layer a tensor belongs to: its name up to the first number, or its module."""
    parts = tensor.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])


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
            entry[0] = (entry[0] + sum(want)) % _MODULUS
            entry[1] = (entry[1] + sum(here)) % _MODULUS
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
