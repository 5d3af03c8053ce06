"""vLLM 0.24: its workers load what a backend fetches. Here they leave the whole update to ours, as later ones do.

From 0.25 on a worker passes `start_weight_update`, `update_weights` and `finish_weight_update` on to its backend,
and vLLM's memory pool remembers what is asleep.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from fp8sync.engines.vllm.compat import has_our_backend

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = Callable[..., Any]

__all__ = ["backend_arguments", "leave_updates_to_backend"]


def leave_updates_to_backend() -> None:
    """Let workers of vLLM 0.24 do as later ones; others are left as they are. Safe to call again."""
    if not _is_early():
        return
    from vllm.device_allocator.cumem import CuMemAllocator
    from vllm.v1.worker.gpu_worker import Worker

    if vars(Worker).get("_fp8sync"):
        return
    Worker._fp8sync = True
    Worker.load_model = _making_backend(Worker.load_model)
    for name in ("start_weight_update", "update_weights", "finish_weight_update"):
        setattr(Worker, name, _left_to_backend(name, getattr(Worker, name)))
    CuMemAllocator.sleep = _noting_sleep(CuMemAllocator.sleep)
    CuMemAllocator.wake_up = _noting_waking(CuMemAllocator.wake_up)


def backend_arguments(config: Any, vllm_config: Any, device: Any, model: Any) -> tuple[Any, ...]:
    """Return what the base class of backends is made of."""
    if _is_early():
        return config, vllm_config.parallel_config, model
    return config, vllm_config, device, model


def _is_early() -> bool:
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

    return not hasattr(WeightTransferEngine, "start_weight_update")


def _making_backend(load_model: Call) -> Call:
    @wraps(load_model)
    def load(self: Any, **options: Any) -> None:
        if not has_our_backend(self.vllm_config):
            load_model(self, **options)
            return
        from fp8sync.engines.vllm.backend import Fp8SyncWeightTransferEngine

        vllm_config = self.vllm_config
        transfer, vllm_config.weight_transfer_config = vllm_config.weight_transfer_config, None
        try:
            load_model(self, **options)
        finally:
            vllm_config.weight_transfer_config = transfer
        about = transfer, vllm_config, self.device, self.model_runner.get_model()
        self.weight_transfer_engine = Fp8SyncWeightTransferEngine(*about)

    return load


def _left_to_backend(name: str, call: Call) -> Call:
    begins = name == "start_weight_update"

    @wraps(call)
    def step(self: Any, *args: Any, **named: Any) -> None:
        if not has_our_backend(self.vllm_config):
            call(self, *args, **named)
            return
        if self._weight_update_active is begins:
            found = "one under way" if begins else "none"
            raise RuntimeError(f"{name}: expected {'no' if begins else 'an'} update, found {found}")
        backend = self.weight_transfer_engine
        if begins:  # what is said of the format is for vLLM's own loading
            backend.start_weight_update()
            self._weight_update_active = True
        elif name == "finish_weight_update":
            backend.finish_weight_update()
            self._weight_update_active = False
        else:
            self._weight_update_active = False
            backend.update_weights(*args, **named)
            self._weight_update_active = True

    return step


def _noting_sleep(sleep: Call) -> Call:
    @wraps(sleep)
    def noting(self: Any, *args: Any, **named: Any) -> None:
        for record in self.pointer_to_data.values():  # first, as some may be when it fails
            record.is_asleep = True
        sleep(self, *args, **named)

    return noting


def _noting_waking(wake_up: Call) -> Call:
    @wraps(wake_up)
    def noting(self: Any, tags: list[str] | None = None) -> None:
        wake_up(self, tags)
        for record in self.pointer_to_data.values():
            if tags is None or record.tag in tags:
                record.is_asleep = False

    return noting
