"""What an audit found: digests of both sides by tensor and by layer, and where they differ."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MODULUS", "AuditReport", "Difference", "Entry", "layer_of"]

MODULUS = 1 << 64
"""Digests add up modulo this."""


@dataclass(frozen=True)
class Entry:
    """One tensor on one engine rank.

    Args:
        tensor: HF parameter name.
        rank: of the engine.
        trainer: sum, modulo 2^64, of the digests of what the trainer holds of it, in the engine's format.
        engine: the same of what the engine's live memory holds.
        unread: why a part of it could not be compared; digests are of the rest.

    Examples:
        >>> Entry("model.norm.weight", 0, trainer=7, engine=7).unread
        ''
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

    Examples:
        >>> print(
        ...     Difference("model.norm.weight", "weight", 1, (0,), "it holds zeros", (0,), 0.5, 0.0)
        ... )
        model.norm.weight, weight from [0] (engine rank 1): at [0] expected 0.5, found 0.0; it holds zeros
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
    """What an audit found; `Link.audit` returns it.

    Args:
        entries: one for every tensor on every engine rank that holds some of it.
        differences: in the order of the entries; empty if nothing that could be read differs.

    Examples:
        >>> entry = Entry("model.layers.0.input_layernorm.weight", 0, trainer=7, engine=8)
        >>> difference = Difference(entry.tensor, "weight", 0, (0,))
        >>> report = AuditReport((entry,), (difference,))
        >>> report.equal, report.unread, report.layers()
        (False, {}, {'model.layers.0': (7, 8)})
    """

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
            both[0] = (both[0] + entry.trainer) % MODULUS
            both[1] = (both[1] + entry.engine) % MODULUS
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
