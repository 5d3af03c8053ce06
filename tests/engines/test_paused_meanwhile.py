"""Engines that their owners pause while a refit is under way, or whose pause still lets requests end."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from fp8sync.engines.vllm import AsyncHandle
from tests.engines import serving, world

if TYPE_CHECKING:
    import torch

    from tests.engines.test_async import Engine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def known(engine: Engine, models: list[torch.nn.Module]) -> list[torch.Tensor]:
    """Log-probabilities of both models, refitted into an engine that nobody pauses."""
    found = []
    for model in models:
        fp8sync.refit(model, engine.llm, world.recipe("blockwise-pow2"))
        found.append(engine.logprobs())
    assert (found[0] - found[1]).abs().max().item() > 0.0
    return found


def test_a_pause_that_lets_requests_end_is_made_one_that_does_not(
    engine: Engine,
    models: list[torch.nn.Module],
    known: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM calls itself paused while it drains: no portion that is installed may compute a token."""
    run, recipe, prompt = engine.loop.run, world.recipe("blockwise-pow2"), serving.PROMPTS[0]
    fp8sync.refit(models[0], engine.llm, recipe)
    old, counts = engine.greedy(prompt, 400), []
    options: Any = {"commit": "in-place", "bucket_bytes": 1 << 18, "transport": "gloo"}
    with fp8sync.connect(models[1], engine.llm, recipe, **options) as link:
        assert link._conductor.portions > 4
        install = link._install

        def watched(*args: Any) -> Any:
            counts.append(engine.written())
            return install(*args)

        monkeypatch.setattr(link, "_install", watched)
        with engine.slow():
            stream = engine.begun(prompt, 400)
            draining = engine.pausing("wait")
            link.refit("keep")
    assert run(engine.llm.is_paused())
    draining.result(60)
    time.sleep(0.2)
    assert not stream.done()
    assert {*counts, engine.written()} == {counts[0]}
    run(engine.llm.resume_generation())
    tokens, reason = stream.result(120)
    assert (len(tokens), reason) == (400, "length")
    # Some on their way while it was counted; then as the new version says it.
    same = next(i for i, token in enumerate(old) if tokens[i] != token)
    assert tokens[same:] == engine.greedy([*prompt, *tokens[:same]], 400 - same)
    assert (engine.logprobs() - known[1]).abs().max().item() == 0.0


@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_wait_is_refused_where_the_owner_pauses_while_bytes_arrive(
    engine: Engine,
    models: list[torch.nn.Module],
    known: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
) -> None:
    """Nothing is disturbed: a pause that lets requests end lets them."""
    run, recipe, prompt = engine.loop.run, world.recipe("blockwise-pow2"), serving.PROMPTS[0]
    fp8sync.refit(models[0], engine.llm, recipe)
    old, update = engine.greedy(prompt, 400), AsyncHandle.update
    pauses = []

    def paused_meanwhile(handle: AsyncHandle, version: int, **options: bool) -> None:
        update(handle, version, **options)
        pauses.append(engine.pausing(mode))

    with fp8sync.connect(models[1], engine.llm, recipe) as link:
        with engine.slow(), monkeypatch.context() as patch:
            stream = engine.begun(prompt, 400)
            patch.setattr(AsyncHandle, "update", paused_meanwhile)
            with pytest.raises(fp8sync.Fp8SyncError, match="1 requests are in flight"):
                link.refit("wait")
        assert run(engine.llm.is_paused())
        assert link.version == 0
        pauses[0].result(60)
        if mode == "wait":
            stream.result(60)
        assert stream.done() is (mode == "wait")
        run(engine.llm.resume_generation())
        assert stream.result(60) == (old, "length")
        assert (engine.logprobs() - known[0]).abs().max().item() == 0.0
        assert link.refit("wait").version == 1
    assert (engine.logprobs() - known[1]).abs().max().item() == 0.0


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_requests_that_have_not_begun_are_of_one_version(
    engine: Engine,
    models: list[torch.nn.Module],
    known: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
) -> None:
    """They queue up in an engine that its owner has paused, and `wait` has nothing to wait for."""
    run, recipe, prompt = engine.loop.run, world.recipe("blockwise-pow2"), serving.PROMPTS[0]
    streams, update = [], AsyncHandle.update

    def one_comes(handle: AsyncHandle, version: int, **options: bool) -> None:
        update(handle, version, **options)
        streams.append(engine.loop.begin(engine.stream(prompt, 20)))
        time.sleep(0.2)

    fp8sync.refit(models[0], engine.llm, recipe)
    run(engine.llm.pause_generation(mode=mode))
    with fp8sync.connect(models[1], engine.llm, recipe) as link, monkeypatch.context() as patch:
        patch.setattr(AsyncHandle, "update", one_comes)
        assert link.refit("wait").version == 1
    assert run(engine.llm.is_paused())
    assert not streams[0].done()
    run(engine.llm.resume_generation())
    assert streams[0].result(60) == (engine.greedy(prompt, 20), "length")
    assert (engine.logprobs() - known[1]).abs().max().item() == 0.0


def test_replicas_that_let_requests_end_stand_where_they_must(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, prompt = AsyncHandle(engine.llm), serving.PROMPTS[0]
    monkeypatch.setattr(handle, "replicas", 2)
    old = engine.greedy(prompt, 400)
    with engine.slow():
        stream = engine.begun(prompt, 400)
        draining = engine.pausing("wait")
        with handle.standing():
            engine.loop.run(asyncio.sleep(0.1))  # for tokens on their way
            before = engine.written()
            time.sleep(0.3)
            assert engine.written() == before
    assert handle.paused()
    draining.result(60)
    handle.resume()
    assert stream.result(60) == (old, "length")
