"""How a version is installed: whole, from staging memory as large as it, or module by module in place."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, get_args

from fp8sync.errors import EngineLost, EngineUnusable, Fp8SyncError, UnsupportedLayout
from fp8sync.sending.outgoing import check_transport

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fp8sync.control import Message

__all__ = [
    "AFTER_DECISION",
    "CLOSED",
    "Commit",
    "check_commit",
    "choose_commit",
    "closed_meanwhile",
    "emptying",
    "half_installed",
    "letting_go_on",
    "strategies_of",
    "unusable",
]

Commit = Literal["staged", "in-place", "auto"]
"""`staged`: bytes land beside the live weights, all of them, and are installed at once. `in-place`: in
portions of some modules, the engine paused from the first installed to the last. `auto`: staged where it
fits into memory."""


CLOSED = "the link was closed meanwhile; connect again"
AFTER_DECISION = "installing failed after the decision: refit again before the engine is used"


def check_commit(commit: str, transport: str) -> None:
    """Raise ValueError for unknown names, UnsupportedLayout for a transport that has no portions."""
    check_transport(transport)
    if commit not in get_args(Commit):
        known = ", ".join(get_args(Commit))
        raise ValueError(f"unknown commit {commit!r}; known: {known}")
    if commit != "staged" and transport == "golden":
        raise UnsupportedLayout(
            f"commit {commit!r} with transport 'golden', which sends whole tensors and not modules: "
            "expected commit 'staged' or another transport"
        )


def choose_commit(wanted: str, short: Mapping[int, str]) -> tuple[str, str]:
    """Return (`staged` or `in-place`, why).

    Args:
        wanted: what the user asked for.
        short: by engine rank, why its memory does not do for staging; empty where it does.
    """
    if wanted != "auto":
        return wanted, "asked for"
    reasons = [f"engine rank {rank}: {reason}" for rank, reason in short.items() if reason]
    return ("in-place", "; ".join(reasons)) if reasons else ("staged", "it fits into memory")


def strategies_of(ready: Sequence[Message]) -> str:
    """Say how workers install modules, and where the proof of `direct` did not end.

    Args:
        ready: what each worker said when it was, by engine rank.
    """
    counts = [f"{said['direct']} direct, {said['process']} by process" for said in ready]
    if len(set(counts)) > 1:
        counts = [f"engine rank {rank}: {count}" for rank, count in enumerate(counts)]
    failed = [
        f"engine rank {rank}: {name} by process as its proof failed: {reason}"
        for rank, said in enumerate(ready)
        for name, reason in said["unproven"].items()
    ]
    return "; ".join([*dict.fromkeys(counts), *failed])


def half_installed(error: Exception, portion: int, portions: int) -> Fp8SyncError:
    """Return what to raise when a version stops after its first portions were installed."""
    text = (
        f"the engine holds {portion} of {portions} portions of the new weights and the rest of the old: "
        "do not use it until a complete refit has succeeded"
    )
    return unusable(text, error)


def unusable(summary: str, error: Exception) -> Fp8SyncError:
    """Return what to raise when an engine may hold parts of two versions: the error, if it says just that.

    Args:
        summary: what it holds.
        error: the reason; that somebody is lost stays `EngineLost`.
    """
    if isinstance(error, Fp8SyncError) and error.summary == summary:
        return error
    return _told(EngineUnusable, summary, error)


def closed_meanwhile(error: BaseException, *, mixed: bool) -> Fp8SyncError:
    """Return what to raise when somebody closed the link, and a refit did not install its version.

    Args:
        error: what the refit came to by it.
        mixed: whether the engine may hold parts of two versions.
    """
    kind = EngineUnusable if mixed else Fp8SyncError
    return kind(CLOSED, [] if CLOSED in str(error) else str(error).split("\n  - "))


def _told(kind: type[Fp8SyncError], summary: str, error: Exception) -> Fp8SyncError:
    kind = EngineLost if isinstance(error, EngineLost) else kind
    return kind(summary, str(error).split("\n  - "))


@contextmanager
def emptying() -> Iterator[None]:
    """Empty caches after a commit; until that is done the engine must not be used."""
    try:
        yield
    except Exception as error:
        text = "the new weights are installed, but caches may hold what the old ones computed"
        raise unusable(f"{text}: refit again before the engine is used", error) from error


@contextmanager
def letting_go_on() -> Iterator[None]:
    """Label a new version and let the engine go on: what fails now says nothing of old weights."""
    try:
        yield
    except Exception as error:
        text = "the new weights are installed, but the engine may stand until the next refit"
        told = _told(Fp8SyncError, text, error)
        told.severed |= getattr(error, "severed", False)
        raise told from error
