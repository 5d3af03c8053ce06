"""vLLM's blocking calls in the caller's thread, the conductor's conversation in another."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, TypeVar

from fp8sync.errors import EngineLost, Fp8SyncError, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["together"]

T = TypeVar("T")


def together(
    task: Future[T],
    calls: Callable[[], None],
    interrupt: Callable[[], None],
    timeout_s: float,
) -> T:
    """Run vLLM's calls here while the conductor works; the conductor's error says more.

    Args:
        task: the conductor's.
        calls: return when vLLM has.
        interrupt: makes `task` end soon.
        timeout_s: how long `task` may take after the calls.
    """
    try:
        calls()
    except BaseException as error:
        if not task.done():
            interrupt()
        told = _error_of(task, timeout_s)
        if isinstance(error, EngineLost) or not isinstance(told, Fp8SyncError):
            raise
        raise told from error
    told = _error_of(task, timeout_s)
    if told is not None:
        if not task.done():
            interrupt()
        raise told
    return task.result()


def _error_of(task: Future[Any], timeout_s: float) -> BaseException | None:
    """Return what a thread's task raised, or that it did not end in time."""
    try:
        return task.exception(timeout_s)
    except FutureTimeout:
        return TransferTimeout(f"the conductor was not done within {timeout_s:g} s")
