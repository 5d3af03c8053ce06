"""Steps of a worker that fail once, or take long, in whatever process it runs (vLLM's `worker_extension_cls`)."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["SABOTAGE", "Sabotage", "slowed"]

SABOTAGE = {"worker_extension_cls": "tests.engines.sabotage.Sabotage"}
"""Option of an engine whose workers are to have these methods."""
_STEP_S = 0.025
"""400 tokens are then written in ten seconds, and not in half a one."""


@contextmanager
def slowed(each_worker: Callable[[str, float], object]) -> Iterator[None]:
    """Nothing that an engine has begun ends before it was looked at, however busy the machine is.

    Args:
        each_worker: calls a method of `Sabotage`, with its argument.
    """
    each_worker("take_time", _STEP_S)
    try:
        yield
    finally:
        each_worker("take_time", 0.0)


class Sabotage:
    """Methods of a worker; called by name, with `collective_rpc`."""

    def take_time(self, seconds: float) -> None:
        """Let every step of the model take so much longer; 0 ends that."""
        runner = self.model_runner
        vars(runner).pop("execute_model", None)
        execute = runner.execute_model

        def slow(*args: Any, **options: Any) -> Any:
            time.sleep(seconds)
            return execute(*args, **options)

        if seconds:
            runner.execute_model = slow

    def keep_prefixes(self, rank: int) -> None:
        """Let the prefix cache not be emptied any more, of the replica that this worker of an engine is."""
        from vllm.v1.core.kv_cache_manager import KVCacheManager

        from fp8sync.engines.vllm.compat import worker_rank

        if worker_rank(self.vllm_config.parallel_config) == rank:
            KVCacheManager.reset_prefix_cache = lambda _: False

    def fail_to_install(self) -> None:
        """Damage a weight in the next install, and raise."""
        from fp8sync.engines.vllm.session import WorkerSession

        install = WorkerSession._install

        def fail(session: Any, portion: Any) -> None:
            WorkerSession._install = install
            install(session, portion)
            with torch.no_grad():
                next(session._worker.model.parameters()).zero_()
            raise RuntimeError("the device is lost")

        WorkerSession._install = fail

    def fail_to_unpack(self, module: str, name: str) -> None:
        """Raise in the second call of what a way in uses to fill staging memory."""
        from importlib import import_module

        way = import_module(module)
        function, calls = getattr(way, name), iter(range(2))

        def fail(*arguments: Any) -> Any:
            if next(calls) == 0:
                return function(*arguments)
            setattr(way, name, function)
            raise torch.OutOfMemoryError("no memory left")

        setattr(way, name, fail)

    def fail_to_receive(self) -> None:
        """Raise before anything of the next version is taken."""
        from fp8sync.engines.vllm.buckets import BucketReceiver

        _fail_once(BucketReceiver, "receive", "nothing can be taken")

    def fail_to_prepare(self) -> None:
        """Raise where the next version is to be processed."""
        from fp8sync.engines.vllm.install import ProcessInstall

        _fail_once(ProcessInstall, "prepare", "no memory left")


def _fail_once(owner: Any, name: str, text: str) -> None:
    real = getattr(owner, name)

    def fail(*_: Any) -> None:
        setattr(owner, name, real)
        raise RuntimeError(text)

    setattr(owner, name, fail)
