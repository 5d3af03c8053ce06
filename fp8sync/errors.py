"""What can go wrong, by name.

Every error carries all violations found, one line each, naming the tensor, the rank, what was expected
and what was found. Errors cross the control channel as plain data (`to_wire`, `from_wire`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "CorruptBucket",
    "EngineLost",
    "EngineUnusable",
    "Fp8SyncError",
    "InstallFailed",
    "NonFiniteWeight",
    "PeerFailed",
    "PlanMismatch",
    "RecipeMismatch",
    "RefitInProgress",
    "TensorMismatch",
    "TransferTimeout",
    "UnsupportedLayout",
    "from_wire",
    "gathered",
]


class Fp8SyncError(Exception):
    """Base of all fp8sync errors; docs/operating.md says of each what to do then.

    Args:
        summary: one sentence.
        violations: every single fault, one line each.

    Examples:
        >>> import torch
        >>> from fp8sync.sources import ModuleSource
        >>> try:
        ...     ModuleSource(torch.nn.Linear(2, 2, device="meta")).manifest()
        ... except Fp8SyncError as error:
        ...     print(f"{type(error).__name__}: {error}")
        UnsupportedLayout: not a plain module
          - weight: expected data, found a meta tensor
          - bias: expected data, found a meta tensor
    """

    def __init__(self, summary: str, violations: Sequence[str] = ()) -> None:
        self.summary = summary
        self.violations = tuple(violations)
        super().__init__("\n  - ".join((summary, *self.violations)))

    severed = False
    """Whether messages may be missing or left over on their way: the next refit has to connect anew."""

    def named(self, summary: str) -> Fp8SyncError:
        """Return the same error with another summary."""
        other = type(self)(summary, self.violations)
        other.severed = self.severed
        return other

    def to_wire(self) -> dict[str, Any]:
        """Return the error as JSON-able data."""
        return {
            "kind": type(self).__name__,
            "summary": self.summary,
            "violations": list(self.violations),
            "severed": self.severed,
        }


class TensorMismatch(Fp8SyncError):
    """Trainer and engine disagree on which tensors exist, or on a shape or dtype."""


class RecipeMismatch(Fp8SyncError):
    """The recipe asks for a format that the engine (or one of its layers) does not hold."""


class UnsupportedLayout(Fp8SyncError):
    """A layout that cannot be moved exactly; refused instead of guessed."""


class PlanMismatch(Fp8SyncError):
    """Two sides computed different plans from the same manifests."""


class NonFiniteWeight(Fp8SyncError):
    """NaN or Inf in a weight; the engine keeps its old weights."""


class CorruptBucket(Fp8SyncError):
    """A bucket arrived truncated, out of order, of another refit, or with a wrong digest."""


class TransferTimeout(Fp8SyncError):
    """A peer did not answer within the timeout."""

    severed = True


class EngineLost(Fp8SyncError):
    """The engine, one of its workers or another rank is gone, or another link has taken the engine."""

    severed = True


class EngineUnusable(Fp8SyncError):
    """The engine may hold parts of two versions, and must not generate until a complete refit succeeds.

    Parts of its weights, or new weights and prefixes that were computed with the old ones.
    """

    severed = True


class InstallFailed(Fp8SyncError):
    """The engine could not process the received weights and keeps its old ones."""


class PeerFailed(Fp8SyncError):
    """A rank stopped because another one did, whose own error says more."""


class RefitInProgress(Fp8SyncError):
    """Another refit of the same engine runs, in this process or in another one."""


_BY_NAME: dict[str, type[Fp8SyncError]] = {
    cls.__name__: cls
    for cls in (
        TensorMismatch,
        RecipeMismatch,
        UnsupportedLayout,
        PlanMismatch,
        NonFiniteWeight,
        CorruptBucket,
        TransferTimeout,
        EngineLost,
        EngineUnusable,
        InstallFailed,
        RefitInProgress,
        PeerFailed,
    )
}


def from_wire(data: Mapping[str, Any]) -> Fp8SyncError:
    """Rebuild an error sent by a peer; an unknown kind becomes the base class.

    Examples:
        >>> from_wire(EngineLost("worker 3 is gone").to_wire())
        EngineLost('worker 3 is gone')
    """
    cls = _BY_NAME.get(str(data.get("kind")), Fp8SyncError)
    error = cls(str(data.get("summary", "")), [str(v) for v in data.get("violations", ())])
    error.severed = cls.severed or data.get("severed") is True
    return error


def gathered(errors: Sequence[Fp8SyncError]) -> Fp8SyncError:
    """Return the first error, carrying what the others say as violations of its own; severed if any is.

    Args:
        errors: at least one; causes before their consequences.

    Examples:
        >>> gathered([EngineLost("worker 3 is gone"), PeerFailed("worker 2 stopped")]).violations
        ('worker 2 stopped',)
    """
    first, *others = errors
    if not others:
        return first
    lines = [*first.violations]
    for other in others:
        lines += [f"{other.summary}: {line}" for line in other.violations] or [other.summary]
    whole = type(first)(first.summary, lines)
    whole.severed = any(error.severed for error in errors)
    return whole
