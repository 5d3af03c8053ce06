"""`vllm.LLM`: synchronous, in this process or with its usual engine process."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from fp8sync.engines.vllm.answers import in_thread
from fp8sync.engines.vllm.compat import caches_prefixes, number_of_label
from fp8sync.engines.vllm.handle import Handle, check_backend, check_emptied
from fp8sync.errors import Fp8SyncError, UnsupportedLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8sync.engines.vllm.handle import InFlight

__all__ = ["LLMHandle"]


class LLMHandle(Handle):
    """A `vllm.LLM`. It generates only inside its own calls, so nothing has to be paused.

    Args:
        llm: made with `weight_transfer_config={"backend": "fp8sync"}`.

    Raises:
        UnsupportedLayout: made without it, or one of several that share workers.

    Examples:
        >>> fp8sync.refit(model, LLMHandle(llm))  # what refit(model, llm) does  # doctest: +SKIP
    """

    def __init__(self, llm: Any) -> None:
        config = llm.llm_engine.vllm_config
        check_backend(config)
        parallel = config.parallel_config
        alone = parallel.distributed_executor_backend == "external_launcher"
        if alone and parallel.world_size > 1:
            raise UnsupportedLayout(
                "distributed_executor_backend='external_launcher': expected an engine that reaches all "
                f"{parallel.world_size} workers, found one that has a single worker, and others on other "
                "ranks; start an LLM that starts its workers itself"
            )
        if parallel.data_parallel_size > 1:
            raise UnsupportedLayout(
                "an LLM of a data-parallel group: expected an engine that reaches all "
                f"{parallel.data_parallel_size} replicas, found one that reaches its own, as each rank "
                "has an LLM; start an AsyncLLM or a server with data_parallel_size"
            )
        super().__init__(llm, parallel.world_size)
        self._llm = llm
        self._caches = caches_prefixes(config)
        self._encodes = bool(config.model_config.is_multimodal_model)
        self._labels = hasattr(llm, "update_weight_version")
        self._resources = getattr(llm.llm_engine.engine_core, "resources", None)
        self.in_process = self._resources is None

    def initialize(self, info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", {"init_info": info})

    def start(self) -> None:
        self._call("start_weight_update")

    def update(self, version: int, *, renew: bool = False) -> None:
        self._call("update_weights", {"update_info": self.note_update(version, renew)})

    def finish(self) -> None:
        self._call("finish_weight_update")

    def check_requests(self, in_flight: InFlight) -> None:
        """Only the caller can step requests that were added but have not ended."""
        count = self._llm.llm_engine.get_num_unfinished_requests()
        if count and in_flight == "wait":
            raise Fp8SyncError(
                f"{count} requests are in flight in an LLM that nobody steps now: step them to "
                "their end before the refit, or choose in_flight='keep' or 'abort'"
            )

    def pause(self, in_flight: InFlight, *, once: bool) -> float:  # noqa: ARG002  (nothing runs)
        engine = self._llm.llm_engine
        known = engine.output_processor
        requests = [*known.request_states, *known.parent_requests]  # one with n > 1 is kept in both
        if requests and in_flight == "abort":
            engine.abort_request(requests, internal=True)
        return time.perf_counter()

    def resume(self) -> None:
        pass

    def reset_caches(self, in_flight: InFlight, *, stale: bool) -> None:
        renewed = self._renews and not stale
        if not renewed and (self._caches or self._encodes or (stale and in_flight == "keep")):
            check_emptied(lambda: self._call("reset_prefix_cache", in_flight == "keep", True))
        if self._encodes:
            self._answer("reset_encoder_cache", self._llm.llm_engine.reset_encoder_cache)

    def last_label(self) -> int:
        return number_of_label(self._call("get_weight_version")) if self._labels else 0

    def label(self, version: str) -> bool:
        if self._labels:
            self._call("update_weight_version", version)
        return self._labels

    def _call(self, method: str, *args: Any) -> Any:
        return self._answer(method, partial(getattr(self._llm, method), *args))

    def _answer(self, method: str, call: Callable[[], Any]) -> Any:
        resources = self._resources
        if resources is None:
            return call()
        answer = in_thread(call)
        return self.answered(answer, method, lambda: resources.engine_dead)
