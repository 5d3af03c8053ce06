"""vLLM's blocking calls in the caller's thread, the conductor's conversation in another."""

from __future__ import annotations

from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fp8sync.errors import EngineLost, Fp8SyncError, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["together"]

T = TypeVar("T")

_MOMENT_S = 0.5
"""For the conductor to hear what workers have said just now, and ranks that are on their way."""


def together(
    task: Future[T],
    calls: Callable[[], None],
    interrupt: Callable[[BaseException], Fp8SyncError | None],
    timeout_s: float,
) -> T:
    """Run vLLM's calls here while the conductor works; the conductor's error says more.

    Unless it is one that comes of our own hanging up, because a call has failed: then that call's does.

    Args:
        task: the conductor's.
        calls: return when vLLM has.
        interrupt: makes `task` end soon, with `EngineLost`; takes the reason, returns what had gone wrong before.
        timeout_s: how long `task` may take after the calls.

    Raises:
        Fp8SyncError: the conductor's error.
        TransferTimeout: the conductor does not end in time.
        BaseException: what a call raised, if the conductor knows no more than that.
    """
    try:
        calls()
    except BaseException as error:
        told = _known(task, partial(interrupt, error), timeout_s)
        # The conductor's may well be the reason why a call failed; but who is lost, vLLM knows better.
        if told is None or isinstance(error, EngineLost) or not isinstance(error, Exception):
            raise
        raise told from error
    wait([task], timeout_s)
    if not task.done():
        late = TransferTimeout(f"the conductor was not done within {timeout_s:g} s")
        interrupt(late)
        wait([task], _MOMENT_S)
        raise late
    return task.result()


def _known(
    task: Future[Any], interrupt: Callable[[], Fp8SyncError | None], timeout_s: float
) -> Fp8SyncError | None:
    """Return what has stopped the conductor, other than its being interrupted."""
    wait([task], _MOMENT_S)
    interrupted, known = not task.done(), None
    if interrupted:
        known = interrupt()
        wait([task], timeout_s)
    told = task.exception() if task.done() else known
    if interrupted and isinstance(told, EngineLost):
        return known
    return told if isinstance(told, Fp8SyncError) else None
