"""Many refits of an engine that generates: exact to the end, and nothing is left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

import fp8sync
from tests.engines import serving, world
from tests.engines.test_async import Engine

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

REFITS, SETTLED, SAMPLES = (200, 20, 10) if torch.cuda.is_available() else (60, 20, 3)
LIMIT_BYTES = 16 << 20


def test_many_refits(tmp_path: Path) -> None:
    models = [world.tiny_model("dense", seed, max_position_embeddings=512) for seed in (1, 2, 3)]
    expected = []
    for seed, model in enumerate(models):
        fresh = world.start_engine(world.write_checkpoint(model, tmp_path / str(seed), "pow2"))
        expected.append((world.logprobs(fresh), world.generate(fresh)))
        del fresh
        world.forget_engines()
    trained = world.tiny_model("dense", 1, max_position_embeddings=512)
    engine = Engine(world.write_config(trained, tmp_path / "config"))
    link = fp8sync.connect(trained, engine.llm, world.recipe("blockwise-pow2"))
    differing, used = 0, {}
    gpu = torch.cuda.is_available()
    for first in range(0, REFITS, REFITS // SAMPLES):
        numbers = range(first + 1, first + REFITS // SAMPLES + 1)
        engine.loop.run(_busy(engine, lambda n=numbers: _refits(link, trained, models, n)))
        logprobs, tokens = expected[numbers[-1] % len(models)]
        differing += int((engine.logprobs() != logprobs).sum())
        differing += engine.greedy(world.PROMPT, 12) != tokens
        used[numbers[-1]] = _used_on_gpu() if gpu else 0
    link.close()
    engine.close()
    assert link.version == REFITS
    assert differing == 0
    assert used[REFITS] - used[SETTLED] <= LIMIT_BYTES


def _refits(link: Any, trained: Any, models: list[Any], numbers: range) -> fp8sync.RefitReport:
    for number in numbers:
        trained.load_state_dict(models[number % len(models)].state_dict())
        report = link.refit("keep")
    return report


async def _busy(engine: Engine, refits: Any) -> None:
    """Generate through the refits; all streams end whole."""
    found, _ = await serving.refit_under_load(engine.stream, refits)
    ended = [(len(tokens), reason) for samples in found for tokens, reason in samples]
    assert {reason for _, reason in ended} == {"length"}
    assert {length for length, _ in ended} == set(serving.TOKENS)


def _used_on_gpu() -> int:
    """Bytes in use on the GPU, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_host_memory(tmp_path: Path) -> None:
    """Refits alone, trainer and engine in this process: generating makes vLLM's own memory grow."""
    model = world.tiny_model("dense", 1)
    llm = world.start_engine(world.write_config(model, tmp_path), load_format="dummy")
    link = fp8sync.connect(model, llm, world.recipe("blockwise-pow2"))
    resident = []
    for _ in range(REFITS):
        link.refit()
        resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] - resident[SETTLED - 1] <= LIMIT_BYTES
    link.close()
    del llm
    world.forget_engines()
