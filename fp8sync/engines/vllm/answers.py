"""Answers of calls into an engine: made in threads that end with this process, waited for within a limit."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fp8sync.errors import EngineLost, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_thread", "settle", "settled"]

_POLL_S = 0.2


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Run a call that may never return in a thread that ends with this process."""
    answer: Future[Any] = Future()
    threading.Thread(target=settle, args=(answer, call), daemon=True).start()
    return answer


def settle(answer: Future[Any], call: Callable[[], Any]) -> None:
    """Make a call, and let `answer` have its result or error, unless nobody waits any more."""
    try:
        result = call()
    # Raised again by the waiting thread.
    except BaseException as error:  # noqa: BLE001
        with suppress(InvalidStateError):
            answer.set_exception(error)
        return
    with suppress(InvalidStateError):
        answer.set_result(result)


def settled(answer: Future[Any], method: str, timeout_s: float, is_dead: Callable[[], bool]) -> Any:
    """Wait for a call to an engine in another process.

    A call that was under way when the engine died is never answered, so its death is watched, too.

    Raises:
        EngineLost: the engine died.
        TransferTimeout: it did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return answer.result(min(_POLL_S, timeout_s))
        except FutureTimeout:  # noqa: PERF203  (it waits)
            if is_dead():
                raise EngineLost(f"the vLLM engine died during {method}") from None
            if time.monotonic() > deadline:
                answer.cancel()
                text = f"the vLLM engine did not answer {method} within {timeout_s:g} s"
                raise TransferTimeout(text) from None
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                raise EngineLost(f"the vLLM engine died during {method}: {error}") from error
            raise
