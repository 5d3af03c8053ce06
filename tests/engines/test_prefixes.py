"""Requests that a refit keeps go on with what they have computed, and nobody else finds it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from fp8sync.engines.vllm import compat
from fp8sync.engines.vllm.prefixes import renamed, renew_at_install
from tests.engines import serving, world
from tests.engines.test_async import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 16
SHORT = [7, 8, 9]
"""Less than a block: nothing of it has a name when the refit comes."""
LONG = [(i * 29 + 3) % 256 for i in range(300)]
"""More than a step computes."""


@pytest.fixture(scope="module")
def engine(
    models: list[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    folder = world.write_config(models[0], tmp_path_factory.mktemp("engine"))
    engine = Engine(folder, block_size=BLOCK, max_num_batched_tokens=48, max_num_seqs=8)
    yield engine
    engine.close()


@pytest.mark.parametrize("paused", [True, False])
def test_what_kept_requests_compute_is_theirs_alone(
    engine: Engine, models: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    """Whoever asks for the same tokens after the refit is answered as with an empty cache."""
    pauses = []

    async def watched(llm: Any, mode: str) -> None:
        pauses.append(mode)
        await pause(llm, mode)

    pause = compat.pause
    fp8sync.refit(models[0], engine.llm, world.recipe("blockwise-pow2"))
    prompts = [*serving.PROMPTS, SHORT]
    with fp8sync.connect(models[1], engine.llm, world.recipe("blockwise-pow2")) as link:
        # Every vLLM keeps both kinds of engine: what a model has seen of pictures is forgotten in a pause.
        link._engine._labels, link._engine._encodes = False, paused
        monkeypatch.setattr(compat, "pause", watched)
        with engine.slow():
            streams = engine.all_begun(prompts, 120)
            late = engine.loop.begin(engine.stream(LONG, 60))
            link.refit("keep")
            assert not any(stream.done() for stream in streams)
        assert pauses == ["keep"] * paused
        written = [stream.result(120) for stream in [*streams, late]]
    assert [(len(tokens), reason) for tokens, reason in written] == [
        *[(120, "length")] * len(prompts),
        (60, "length"),
    ]
    asked = [
        [*prompt, *tokens[:-1]]
        for prompt, (tokens, _) in zip([*prompts, LONG], written, strict=True)
    ]
    for tokens in asked:  # a block more each time, so that none is missing before those to be found
        for length in range(BLOCK + 1, len(tokens), BLOCK):
            engine.greedy(tokens[:length], 1)
    found = [engine.greedy(tokens, 24) for tokens in asked]
    engine.loop.run(engine.llm.reset_prefix_cache())
    assert found == [engine.greedy(tokens, 24) for tokens in asked]


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_vllm_computes_kept_requests_again_only_if_asked(
    engine: Engine, models: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    asked: list[bool] = []
    reset = engine.llm.reset_prefix_cache

    async def watched(recompute: bool, connector: bool) -> bool:
        asked.append(recompute)
        return await reset(recompute, connector)

    monkeypatch.setattr(engine.llm, "reset_prefix_cache", watched)
    with fp8sync.connect(models[0], engine.llm, world.recipe("blockwise-pow2")) as link:
        with engine.slow():
            stream = engine.begun(serving.PROMPTS[0], 60)
            link.refit(mode)
            assert not stream.done()
        assert asked == ([True] if mode == "recompute" else [])
        assert len(stream.result(120)[0]) == 60


def test_an_engine_that_does_not_renew_computes_them_again(
    engine: Engine, models: list[torch.nn.Module]
) -> None:
    """As where its process has another plugin, or a KV connector."""
    with fp8sync.connect(models[0], engine.llm, world.recipe("blockwise-pow2")) as link:
        link.refit()
        old = serving.greedy(engine.greedy)
    with fp8sync.connect(models[1], engine.llm, world.recipe("blockwise-pow2")) as link:
        assert link._engine._can_renew
        link._engine._can_renew = False
        found, _ = engine.loop.run(
            serving.refit_under_load(engine.stream, lambda: link.refit("keep"))
        )
    serving.judge("recompute", found, old, serving.greedy(engine.greedy), engine.greedy)


def test_other_calls_pass_as_they_are() -> None:
    """vLLM makes some before it has a scheduler."""
    from vllm.v1.engine.core import EngineCore

    renew_at_install()
    core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=lambda *said: said))
    call = "update_max_model_len", None, (5,), {"a": 1}
    assert EngineCore.collective_rpc(core, *call) == call


def test_requests_that_have_computed_nothing_keep_their_names() -> None:
    def request(computed: int, count: int) -> SimpleNamespace:
        hashes = [bytes([n]) * 32 for n in range(count)]
        return SimpleNamespace(num_computed_tokens=computed, cache_salt=None, block_hashes=hashes)

    waiting, begun, other, short = request(0, 3), request(1, 3), request(40, 3), request(5, 0)
    for each in (waiting, begun, other, short):
        renamed(each)
    assert vars(waiting) == vars(request(0, 3))
    names = [*waiting.block_hashes, *begun.block_hashes, *other.block_hashes]
    assert len({*names}) == len(names) == 9
    assert {len(name) for name in names} == {32}
    assert len({begun.cache_salt, other.cache_salt, short.cache_salt, None}) == 4
