"""Requests that vLLM has preempted for want of KV blocks: they have tokens, and stand in its queue."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import fp8sync
from tests.engines import serving, world
from tests.engines.test_async import Engine

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 340


def test_wait_ends_what_was_preempted(tmp_path: Path) -> None:
    """The cache holds less than two of four streams: from some 140 tokens each on, one or more wait for room."""
    models = serving.models()
    room = {"block_size": 16, "num_gpu_blocks_override": 40}
    engine = Engine(world.write_config(models[0], tmp_path), **room)
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
