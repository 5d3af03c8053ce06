"""Fixtures of tests on live engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from tests.engines.test_async import Engine


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


@pytest.fixture(scope="module")
def models() -> list[torch.nn.Module]:
    """Two of one kind that say different things, for engines that are refitted while they work."""
    from tests.engines import serving

    return serving.models()


@pytest.fixture(scope="module")
def engine(
    models: list[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An `AsyncLLM` as it comes; files whose engine has options of its own have their own fixture."""
    from tests.engines import world
    from tests.engines.test_async import Engine

    engine = Engine(world.write_config(models[0], tmp_path_factory.mktemp("engine")))
    yield engine
    engine.close()


@pytest.fixture
def untouched(engine: Any, link: Any) -> Iterator[None]:
    """The old weights of a file's own engine serve on, to the bit; then the next refit brings the new ones, every byte."""
    import torch

    from tests.engines import world

    logprobs, digests = world.logprobs(engine), world.live_bytes(engine)
    yield
    assert torch.equal(world.logprobs(engine), logprobs)
    assert world.live_bytes(engine) == digests
    assert link.version == 1
    assert link.refit().version == 2
    assert not torch.equal(world.logprobs(engine), logprobs)
    assert link.audit().equal
