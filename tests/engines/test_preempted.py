"""Requests that vLLM has preempted for want of KV blocks: they have tokens, and stand in its queue."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import fp8sync
from tests.engines import serving, world
from tests.engines.test_async import Engine
from tests.engines.test_server import Served

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 340


ROOM = {"block_size": 16, "num_gpu_blocks_override": 40}
"""Less than two of four streams: from some 140 tokens each on, one or more wait for room."""


def test_wait_ends_what_was_preempted(tmp_path: Path) -> None:
    models = serving.models()
    engine = Engine(world.write_config(models[0], tmp_path), **ROOM)
    recipe = world.recipe("blockwise-pow2")

    fp8sync.refit(models[1], engine.llm, recipe)
    new = [engine.greedy(prompt, TOKENS) for prompt in serving.PROMPTS]
    fp8sync.refit(models[0], engine.llm, recipe)
    old = [engine.greedy(prompt, TOKENS) for prompt in serving.PROMPTS]
    assert all(a != b for a, b in zip(old, new, strict=True))
    with engine.slow():
        streams = [engine.loop.begin(engine.stream(prompt, TOKENS)) for prompt in serving.PROMPTS]
        while engine.written() < 400:
            assert not any(stream.done() for stream in streams)
            time.sleep(0.01)
        fp8sync.refit(models[1], engine.llm, recipe, in_flight="wait")
    assert [stream.result(120) for stream in streams] == [(tokens, "length") for tokens in old]
    assert [engine.greedy(prompt, TOKENS) for prompt in serving.PROMPTS] == new
    engine.close()


def test_a_server_ends_it_too(tmp_path: Path) -> None:
    """vLLM's own pause does not; the engine's process says what is left."""
    models = serving.models()
    recipe = world.recipe("blockwise-pow2")
    served = Served(world.write_config(models[0], tmp_path / "config"), tmp_path / "log", **ROOM)
    try:
        fp8sync.refit(models[1], served.url, recipe)
        new = [served.greedy(prompt, TOKENS) for prompt in serving.PROMPTS]
        fp8sync.refit(models[0], served.url, recipe)
        old = [served.greedy(prompt, TOKENS) for prompt in serving.PROMPTS]
        assert all(a != b for a, b in zip(old, new, strict=True))
        with ThreadPoolExecutor(len(old)) as pool, served.slow():
            streams = [pool.submit(served.greedy, prompt, TOKENS) for prompt in serving.PROMPTS]
            for name, count in (("requests_running", len(old)), ("requests_waiting", 1)):
                while (
                    served.count(name) < count
                ):  # all have begun; then some stand in the queue again
                    assert not any(stream.done() for stream in streams)
                    time.sleep(0.01)
            fp8sync.refit(models[1], served.url, recipe, in_flight="wait")
        assert [stream.result(120) for stream in streams] == old
        assert [served.greedy(prompt, TOKENS) for prompt in serving.PROMPTS] == new
    finally:
        served.close()
