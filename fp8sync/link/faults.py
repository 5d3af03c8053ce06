"""What went wrong in a refit, gathered from all peers: each worker, each trainer rank, each tensor."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from typing import TYPE_CHECKING

from fp8sync.errors import (
    EngineLost,
    EngineUnusable,
    Fp8SyncError,
    NonFiniteWeight,
    PeerFailed,
    PlanMismatch,
    TransferTimeout,
)
from fp8sync.link.commit import AFTER_DECISION

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8sync.control import Message
    from fp8sync.plan import Plan
    from fp8sync.sending.share import Sent

__all__ = ["as_ours", "broken", "difference", "failures", "nonfinite", "with_refusals"]


def as_ours(error: BaseException) -> Fp8SyncError:
    """Return what peers can be told of an error, whatever it is."""
    return error if isinstance(error, Fp8SyncError) else Fp8SyncError(repr(error))


def broken(done: Iterable[Message], lost: Sequence[Fp8SyncError]) -> list[Fp8SyncError]:
    """Return what went wrong after the decision to install: the engine may hold parts of two versions."""
    found = [f"{said['peer']}: {said['failure']}" for said in done if said["failure"]]
    found += [str(error) for error in lost]
    if not found:
        return []
    gone = any(isinstance(error, EngineLost) for error in lost)
    return [(EngineLost if gone else EngineUnusable)(AFTER_DECISION, found)]


def failures(shares: Iterable[Sent]) -> list[Fp8SyncError]:
    """Return errors of the trainer's ranks, causes before their consequences on other ranks."""
    errors = [share.error for share in shares if share.error is not None]
    return sorted(errors, key=lambda error: isinstance(error, PeerFailed))


def nonfinite(shares: Iterable[Sent]) -> list[Fp8SyncError]:
    """Return the one error that names every tensor with NaN or Inf, if there is one."""
    bad: Counter[str] = Counter()
    for share in shares:
        for part in share.parts:
            bad[f"{part.tensor} (trainer rank {share.rank})"] += part.nonfinite
    faults = [
        f"{where}: expected finite values, found {count} NaN or Inf"
        for where, count in bad.items()
        if count
    ]
    return [NonFiniteWeight("NaN or Inf in the trainer's weights", faults)] if faults else []


def with_refusals(
    faults: Sequence[Fp8SyncError], refused: Sequence[Fp8SyncError]
) -> list[Fp8SyncError]:
    """Return why a version is not installed: what the trainer's ranks met, and what workers say to it.

    Mostly a worker refuses because a rank of the trainer failed, and says less than that rank. Not so where
    somebody is lost, whose neighbours may know more, and where ranks only waited in vain: for a worker that
    had failed before it took anything, perhaps. That a worker missed messages is always said, since it
    decides whether the link can be kept.
    """
    if not faults or any(isinstance(fault, EngineLost) for fault in faults):
        return [*faults, *refused]
    if all(isinstance(fault, TransferTimeout) for fault in faults):
        late = (TransferTimeout, PeerFailed)
        return [*(error for error in refused if not isinstance(error, late)), *faults]
    return [*faults, *(error for error in refused if error.severed)]


def difference(
    plan: Plan, theirs: dict[str, dict[str, str]], peer: str, source: int | None
) -> PlanMismatch:
    """Return the error that names the first tensor in which a peer's digests, or their order, differ.

    Args:
        plan: ours.
        theirs: the peer's digests of tensors, by part of the plan.
        peer: what to call it.
        source: the peer, if it is a trainer rank: of each part it knows what it sends.
    """
    summary = f"{peer} computed another plan than trainer rank 0"
    for part, found in theirs.items():
        mine = plan.amax_digests() if part == "amax" else plan.digests(int(part), source)
        what = "amax of cut blocks" if part == "amax" else f"to engine rank {part}"
        for own, other in zip_longest(mine.items(), found.items()):
            if own != other:
                name, _ = own or other or ("", "")
                line = (
                    f"{name}: first tensor that differs ({what}); "
                    f"expected {mine.get(name)}, found {found.get(name)}"
                )
                order = "" if mine.get(name) != found.get(name) else ", elsewhere in the order"
                return PlanMismatch(summary, [line + order])
    return PlanMismatch(f"{summary}, whose tensors' digests are the same")
