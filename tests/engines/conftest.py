"""Fixtures of tests on live engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Give a processor's engine one thread: with more, BF16 sums depend on the size of the batch."""
    from vllm import envs

    envs.disable_envs_cache()  # an engine started earlier in this process has frozen them
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        # Threads are bound in a worker's process; `world.start_engine` may have asked for none.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        yield
