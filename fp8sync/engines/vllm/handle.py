"""A vLLM engine as the trainer holds it: its update calls, its size, its caches."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from fp8sync.errors import EngineLost, RefitInProgress, TransferTimeout, UnsupportedLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LLMHandle", "as_engine"]

_POLL_S = 0.2
_locks: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_claims: WeakKeyDictionary[Any, object] = WeakKeyDictionary()
"""Which link each engine of this process follows; its workers know only the latest."""


class LLMHandle:
    """`vllm.LLM`, in this process or with its usual engine process.

    Args:
        llm: made with `weight_transfer_config={"backend": "fp8sync"}`.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        config = llm.llm_engine.vllm_config
        transfer = config.weight_transfer_config
        if transfer is None or transfer.backend != "fp8sync":
            found = None if transfer is None else transfer.backend
            raise UnsupportedLayout(
                "the engine was not made for fp8sync: expected "
                f"weight_transfer_config={{'backend': 'fp8sync'}}, found backend {found!r}"
            )
        parallel = config.parallel_config
        self.timeout_s = 600.0
        self.workers = parallel.world_size * parallel.data_parallel_size

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other links of this process off the engine.

        Raises:
            RefitInProgress: one is refitting or connecting.
        """
        lock = _locks.setdefault(self._llm, threading.Lock())
        if not lock.acquire(blocking=False):
            raise RefitInProgress("the engine is already being refitted or connected")
        try:
            yield
        finally:
            lock.release()

    def claim(self, token: object) -> None:
        """Make the link that holds `token` the one that this engine follows."""
        _claims[self._llm] = token

    def follows(self, token: object) -> bool:
        """Whether no other link has claimed the engine since."""
        return _claims.get(self._llm) is token

    def initialize(self, info: dict[str, Any]) -> None:
        """Let every worker join a link; blocks until they have agreed or refused."""
        self._call("init_weight_transfer_engine", {"init_info": info})

    def start(self) -> None:
        """Open a version on every worker."""
        self._call("start_weight_update")

    def update(self, version: int) -> None:
        """Block until every worker has received the version, or failed to."""
        self._call("update_weights", {"update_info": {"version": version}})

    def finish(self) -> None:
        """Let every worker install or abandon the version."""
        self._call("finish_weight_update")

    def reset_caches(self) -> None:
        """Forget prefixes computed with the old weights; they live in the scheduler."""
        self._call("reset_prefix_cache")

    def _call(self, method: str, *args: Any) -> None:
        call = getattr(self._llm, method)
        core = self._llm.llm_engine.engine_core
        resources = getattr(core, "resources", None)
        if resources is None:  # the engine lives in this process
            call(*args)
            return
        # A call that was under way when the engine process died is never answered: wait beside it.
        answer: Future[Any] = Future()
        threading.Thread(target=_settle, args=(answer, call, args), daemon=True).start()
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                answer.result(_POLL_S)
            except FutureTimeout:  # noqa: PERF203  (it waits)
                if resources.engine_dead:
                    raise EngineLost(f"the vLLM engine died during {method}") from None
                if time.monotonic() > deadline:
                    text = f"the vLLM engine did not answer {method} within {self.timeout_s:g} s"
                    raise TransferTimeout(text) from None
            except Exception as error:
                if type(error).__name__ == "EngineDeadError":
                    raise EngineLost(f"the vLLM engine died during {method}: {error}") from error
                raise
            else:
                return


def _settle(answer: Future[Any], call: Any, args: tuple[Any, ...]) -> None:
    try:
        answer.set_result(call(*args))
    # Raised again by the waiting thread.
    except BaseException as error:  # noqa: BLE001
        answer.set_exception(error)


def as_engine(engine: Any) -> LLMHandle:
    """Return a handle for an engine.

    Args:
        engine: a `vllm.LLM`, or a handle.

    Raises:
        UnsupportedLayout: not an engine that fp8sync can drive.
    """
    if isinstance(engine, LLMHandle):
        return engine
    if type(engine).__name__ == "LLM" and hasattr(engine, "llm_engine"):
        return LLMHandle(engine)
    raise UnsupportedLayout(f"cannot refit a {type(engine).__name__}: expected a vllm.LLM")
