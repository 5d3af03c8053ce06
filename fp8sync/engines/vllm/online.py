"""`AsyncLLM`: it generates in an event loop while its workers receive."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fp8sync.engines.vllm import compat
from fp8sync.engines.vllm.handle import Handle, check_backend, check_emptied
from fp8sync.errors import Fp8SyncError, TransferTimeout, UnsupportedLayout

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from fp8sync.engines.vllm.handle import InFlight

__all__ = ["AsyncHandle"]


class AsyncHandle(Handle):
    """A `vllm.v1.engine.async_llm.AsyncLLM`, driven from a thread other than its event loop's.

    Args:
        engine: made with `weight_transfer_config={"backend": "fp8sync"}`.
        loop: the event loop that it runs in; found by itself once the engine has one.

    Raises:
        UnsupportedLayout: made without it, or one of several that share its replicas.
        Fp8SyncError: the engine runs in no event loop yet.

    Examples:
        >>> await asyncio.to_thread(fp8sync.refit, model, engine)  # doctest: +SKIP
    """

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop | None = None) -> None:
        config = engine.vllm_config
        check_backend(config)
        if why := compat.unreached(config.parallel_config):
            raise UnsupportedLayout(why)
        super().__init__(engine, config.parallel_config.world_size_across_dp)
        self._engine = engine
        handler = engine.output_handler
        if loop is None and handler is None:
            raise Fp8SyncError(
                "this AsyncLLM runs in no event loop yet: make it inside its loop, or pass "
                "fp8sync.engines.vllm.AsyncHandle(engine, loop)"
            )
        self._loop = loop or handler.get_loop()
        # Several schedulers step together, and a label is changed by a call of its own.
        self._caches = compat.caches_prefixes(config)
        self._encodes = bool(config.model_config.is_multimodal_model)
        self.replicas = config.parallel_config.data_parallel_size
        self._labels = hasattr(engine, "update_weight_version")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """As for every engine, and never from the event loop, which would wait for itself."""
        if _runs_here(self._loop):
            raise Fp8SyncError(
                "called from the engine's own event loop: "
                "use `await asyncio.to_thread(fp8sync.refit, model, engine)`"
            )
        with super().exclusive():
            yield

    def initialize(self, info: dict[str, Any]) -> None:
        request = compat.init_request(info)
        self._call("init_weight_transfer_engine", request)

    def start(self) -> None:
        self._call("start_weight_update")

    def update(self, version: int, *, renew: bool = False) -> None:
        self._call("update_weights", compat.update_request(self.note_update(version, renew)))

    def finish(self) -> None:
        self._call("finish_weight_update")

    def pause(self, in_flight: InFlight, *, once: bool) -> float | None:
        caches = self._caches and not self._renews
        changes = caches or self._encodes or self._labels  # more than weights
        if in_flight == "keep" and once and self.replicas == 1 and not changes:
            return None
        try:
            since: float = self._run("pause", compat.pause(self._engine, in_flight))
        except TransferTimeout as error:
            if in_flight != "wait":
                raise
            count = len(self._engine.output_processor.request_states)
            text = (
                f"{count} requests have not ended; choose in_flight='abort' or a longer timeout_s"
            )
            raise error.named(f"{error.summary}: {text}") from error
        return since

    def resume(self) -> None:
        self._call("resume_generation")

    def paused(self) -> bool:
        return bool(self._call("is_paused"))

    def check_requests(self, in_flight: InFlight) -> None:
        """A paused engine steps no request to its end."""
        held = self._engine.output_processor.request_states
        if held and in_flight == "wait" and not self._owed and self.paused():
            self.check_held()

    def check_held(self) -> None:
        """Of those without a token, what has been computed is computed again once caches are empty."""
        states = self._engine.output_processor.request_states
        count = self._run("requests", compat.begun(states)) if self._caches else len(states)
        if count:
            raise Fp8SyncError(
                f"{count} requests are in flight in an engine that is paused: let it go on before the "
                "refit, or choose in_flight='keep' or 'abort'"
            )

    def reset_caches(self, in_flight: InFlight, *, stale: bool) -> None:
        renewed = self._renews and not stale
        if not renewed and (self._caches or self._encodes or (stale and in_flight == "keep")):
            check_emptied(lambda: self._call("reset_prefix_cache", in_flight == "keep", True))
        if self._encodes:
            self._call("reset_encoder_cache")

    def last_label(self) -> int:
        return compat.number_of_label(self._call("get_weight_version")) if self._labels else 0

    def label(self, version: str) -> bool:
        if self._labels:
            self._call("update_weight_version", version)
        return self._labels

    def _call(self, method: str, *args: Any) -> Any:
        return self._run(method, getattr(self._engine, method)(*args))

    def _run(self, name: str, call: Coroutine[Any, Any, Any]) -> Any:
        answer = asyncio.run_coroutine_threadsafe(call, self._loop)
        return self.answered(answer, name, lambda: self._engine.errored)


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
