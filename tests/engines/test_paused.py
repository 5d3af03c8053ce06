"""Engines that their owners have paused, or put to sleep, stay so through a refit; replicas stand where they must."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from fp8sync.engines.vllm import AsyncHandle
from tests import skips
from tests.engines import serving, world
from tests.engines.test_async import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine(
    models: list[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    folder = world.write_config(models[0], tmp_path_factory.mktemp("engine"))
    engine = Engine(folder, enable_sleep_mode=skips.cuda_devices() > 0)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def known(engine: Engine, models: list[torch.nn.Module]) -> list[torch.Tensor]:
    """Log-probabilities of both models, refitted into an engine that nobody pauses."""
    found = []
    for model in models:
        fp8sync.refit(model, engine.llm, world.recipe("blockwise-pow2"))
        assert not engine.loop.run(engine.llm.is_paused())
        found.append(engine.logprobs())
    assert (found[0] - found[1]).abs().max().item() > 0.0
    return found


@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
def test_paused_stays_paused(
    engine: Engine, models: list[torch.nn.Module], known: list[torch.Tensor], mode: str
) -> None:
    run, recipe = engine.loop.run, world.recipe("blockwise-pow2")
    fp8sync.refit(models[0], engine.llm, recipe)
    run(engine.llm.pause_generation(mode="keep"))
    fp8sync.refit(models[1], engine.llm, recipe, in_flight=mode)
    assert run(engine.llm.is_paused())
    run(engine.llm.resume_generation())
    assert (engine.logprobs() - known[1]).abs().max().item() == 0.0


def test_awake_in_part(
    engine: Engine, models: list[torch.nn.Module], known: list[torch.Tensor]
) -> None:
    """Weights awake, refit, KV cache awake: nothing is computed before the last."""
    run, recipe = engine.loop.run, world.recipe("blockwise-pow2")
    fp8sync.refit(models[0], engine.llm, recipe)
    run(engine.llm.sleep(level=1))
    run(engine.llm.wake_up(["weights"]))
    late = engine.loop.begin(engine.stream(world.PROMPT, 4))
    fp8sync.refit(models[1], engine.llm, recipe, in_flight="keep")
    assert run(engine.llm.is_paused())
    assert not late.done()
    run(engine.llm.wake_up(["kv_cache"]))
    assert late.result(60)[0] == engine.greedy(world.PROMPT, 4)
    assert not run(engine.llm.is_paused())
    assert (engine.logprobs() - known[1]).abs().max().item() == 0.0


def test_requests_of_a_paused_engine_are_not_waited_for(
    engine: Engine, models: list[torch.nn.Module], known: list[torch.Tensor]
) -> None:
    """They would never end: refused before anything is sent, and kept where that is asked for."""
    run, recipe = engine.loop.run, world.recipe("blockwise-pow2")
    fp8sync.refit(models[0], engine.llm, recipe)
    with engine.slow():
        streams = engine.all_begun(serving.PROMPTS, 400)
        run(engine.llm.pause_generation(mode="keep"))
    with pytest.raises(fp8sync.Fp8SyncError, match="4 requests are in flight in an engine that is"):
        fp8sync.refit(models[1], engine.llm, recipe)
    report = fp8sync.refit(models[1], engine.llm, recipe, in_flight="keep")
    assert report.bytes_sent
    assert run(engine.llm.is_paused())
    assert not any(stream.done() for stream in streams)
    run(engine.llm.resume_generation())
    assert {len(stream.result(120)[0]) for stream in streams} == {400}
    assert (engine.logprobs() - known[1]).abs().max().item() == 0.0


def refuse(_: AsyncHandle, *__: object, **___: object) -> None:
    raise RuntimeError("pause is still in flight")


def test_what_did_not_resume_is_resumed_by_the_next_refit(
    engine: Engine, models: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As replicas do not, before their requests have ended."""
    with fp8sync.connect(models[0], engine.llm, world.recipe("blockwise-pow2")) as link:
        with monkeypatch.context() as patch:
            patch.setattr(AsyncHandle, "resume", refuse)
            with pytest.raises(fp8sync.Fp8SyncError, match="new weights are installed") as raised:
                link.refit()
        assert raised.value.violations == ("pause is still in flight",)
        assert engine.loop.run(engine.llm.is_paused())
        link.refit()
        assert not engine.loop.run(engine.llm.is_paused())


def test_an_engine_that_does_not_say_whether_it_is_paused_is_left_as_it_is(
    engine: Engine, models: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.loop.run
    with fp8sync.connect(models[0], engine.llm, world.recipe("blockwise-pow2")) as link:
        link.refit()
        run(engine.llm.pause_generation(mode="keep"))
        with monkeypatch.context() as patch:
            patch.setattr(AsyncHandle, "paused", refuse)
            with pytest.raises(fp8sync.Fp8SyncError, match="in flight"):
                link.refit()
        assert run(engine.llm.is_paused())
        link.refit()
        assert run(engine.llm.is_paused())
    run(engine.llm.resume_generation())


def test_an_engine_that_went_on_without_saying_so_holds_one_version(
    engine: Engine, models: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests are waited for by the next link; those of an engine that holds parts of two would be kept."""
    recipe, resume = world.recipe("blockwise-pow2"), AsyncHandle.resume

    def unheard(handle: AsyncHandle) -> None:
        resume(handle)
        raise fp8sync.TransferTimeout("no answer to resume_generation")

    with monkeypatch.context() as patch:
        patch.setattr(AsyncHandle, "resume", unheard)
        with pytest.raises(fp8sync.Fp8SyncError, match="new weights are installed"):
            fp8sync.refit(models[0], engine.llm, recipe)
    assert not engine.loop.run(engine.llm.is_paused())
    expected = engine.greedy(world.PROMPT, 80)
    with engine.slow():
        request = engine.begun(world.PROMPT, 80)
        fp8sync.refit(models[1], engine.llm, recipe, in_flight="wait")
    assert request.result(60)[0] == expected
    assert engine.greedy(world.PROMPT, 80) != expected


def test_what_did_not_resume_is_resumed_by_another_link(
    engine: Engine, models: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With old prefixes cached it stands until a refit has succeeded, whichever link's."""
    run, recipe = engine.loop.run, world.recipe("blockwise-pow2")
    fp8sync.refit(models[0], engine.llm, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(AsyncHandle, "reset_caches", refuse)
        with pytest.raises(fp8sync.EngineUnusable, match="in flight"):
            fp8sync.refit(models[1], engine.llm, recipe)
        assert run(engine.llm.is_paused())
        with pytest.raises(fp8sync.EngineUnusable, match="in flight"):
            fp8sync.refit(models[1], engine.llm, recipe, timeout_s=60.0)
        assert run(engine.llm.is_paused())
    fp8sync.refit(models[1], engine.llm, recipe, timeout_s=300.0)
    assert not run(engine.llm.is_paused())
    run(engine.llm.pause_generation(mode="keep"))
    fp8sync.refit(models[1], engine.llm, recipe)  # its owner's, as nothing is owed any more
    assert run(engine.llm.is_paused())
    run(engine.llm.resume_generation())
    with monkeypatch.context() as patch:
        patch.setattr(AsyncHandle, "resume", refuse)
        with pytest.raises(fp8sync.Fp8SyncError, match="new weights are installed"):
            fp8sync.refit(models[0], engine.llm, recipe)
    assert run(engine.llm.is_paused())
    with fp8sync.connect(models[0], engine.llm, recipe) as link:
        link.refit()
    assert not run(engine.llm.is_paused())


def test_what_another_link_left_paused_is_not_its_owners_pause_before(
    engine: Engine, models: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = engine.loop.run, world.recipe("blockwise-pow2")
    with fp8sync.connect(models[0], engine.llm, recipe) as link:
        run(engine.llm.pause_generation(mode="keep"))
        link.refit()
        run(engine.llm.resume_generation())
        with (
            fp8sync.connect(models[1], engine.llm, recipe) as other,
            monkeypatch.context() as patch,
        ):
            patch.setattr(AsyncHandle, "reset_caches", refuse)
            with pytest.raises(fp8sync.EngineUnusable, match="in flight"):
                other.refit()
        assert run(engine.llm.is_paused())
        link.refit()
        assert not run(engine.llm.is_paused())


def test_refit_makes_the_link_anew_when_its_limit_changes(
    engine: Engine, models: list[torch.nn.Module]
) -> None:
    recipe = world.recipe("blockwise-pow2")
    fp8sync.close(engine=engine.llm)
    versions = [
        fp8sync.refit(models[0], engine.llm, recipe, timeout_s=limit).version
        for limit in (120.0, 120.0, 60.0, 60.0)
    ]
    assert versions == [1, 2, 1, 2]


def test_a_paused_engine_of_a_list_stays_so_and_the_others_requests_end(
    engine: Engine,
    models: list[torch.nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`wait` is `keep` for the paused one alone; while that holds a request, neither is refitted."""
    monkeypatch.delenv("VLLM_PORT")  # which the first engine has
    other = Engine(world.write_config(models[0], tmp_path))
    run, both = engine.loop.run, [engine.llm, other.llm]
    prompt, tokens = serving.PROMPTS[3], serving.TOKENS[3]
    recipe = world.recipe("blockwise-pow2")
    try:
        with fp8sync.connect(models[1], both, recipe) as link:
            link.refit()
            new = other.greedy(prompt, tokens)
        with fp8sync.connect(models[0], both, recipe) as link:
            link.refit()
            old = other.greedy(prompt, tokens)
        with engine.slow():
            frozen = engine.begun(prompt, tokens)
            run(engine.llm.pause_generation(mode="keep"))
        with fp8sync.connect(models[1], both, recipe) as link:
            with monkeypatch.context() as patch:
                patch.setattr(AsyncHandle, "check_requests", lambda *_: None)  # as of a server
                stream = other.begun(prompt, tokens)
                with pytest.raises(fp8sync.Fp8SyncError, match="engine 0 of the list: 1 requests"):
                    link.refit()
            assert stream.result(60) == (old, "length")
            assert not other.loop.run(other.llm.is_paused())
            assert run(engine.llm.is_paused())
            assert not frozen.done()
            run(engine.llm.resume_generation())
            assert frozen.result(60) == (old, "length")
            run(engine.llm.pause_generation(mode="keep"))
            stream = other.begun(prompt, tokens)
            link.refit()
        assert stream.result(60) == (old, "length")
        assert not other.loop.run(other.llm.is_paused())
        assert run(engine.llm.is_paused())
        run(engine.llm.resume_generation())
        assert engine.greedy(prompt, tokens) == other.greedy(prompt, tokens) == new
    finally:
        other.close()


def test_a_pause_of_replicas_that_is_late_is_ended(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = AsyncHandle(engine.llm)
    pause = handle.pause

    def late(mode: Any, *, once: bool) -> bool:
        pause(mode, once=once)
        raise fp8sync.TransferTimeout("the vLLM engine did not answer pause")

    monkeypatch.setattr(handle, "replicas", 2)
    monkeypatch.setattr(handle, "pause", late)
    with pytest.raises(fp8sync.TransferTimeout), handle.standing():
        raise AssertionError("it does not stand")
    assert not engine.loop.run(engine.llm.is_paused())


@pytest.mark.multigpu(2 if skips.cuda_devices() else 0)
def test_replicas_stand_while_all_workers_are_waited_for(
    models: list[torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data parallel: at connect and in an audit, not for the transfer; all replicas hold the same afterwards.

    That the second one alone has kept its prefixes is heard, too.
    """
    monkeypatch.delenv("VLLM_PORT")  # from which both replicas would take the first
    # A worker in its scheduler's process, whose cache it is told to keep; with replicas, vLLM parts them on GPUs.
    where = {"distributed_executor_backend": world.ONE_PROCESS}
    folder = world.write_config(models[0], tmp_path)
    engine = Engine(folder, data_parallel_size=2, **where)
    stood: dict[str, bool] = {}

    def watched(name: str) -> Callable[..., None]:
        real = getattr(AsyncHandle, name)

        def call(handle: AsyncHandle, *args: object, **options: object) -> None:
            stood[name] = engine.loop.run(engine.llm.is_paused())
            real(handle, *args, **options)

        return call

    for name in ("initialize", "start", "update", "finish"):
        monkeypatch.setattr(AsyncHandle, name, watched(name))
    with fp8sync.connect(models[0], engine.llm, world.recipe("blockwise-pow2")) as link:
        assert stood == {"initialize": True}
        assert not engine.loop.run(engine.llm.is_paused())
        for mode in ("wait", "keep", "abort"):
            link.refit(mode)
            assert stood == {"initialize": True, "start": False, "update": False, "finish": True}
        assert not engine.loop.run(engine.llm.is_paused())
        assert link.audit().equal
        assert stood["finish"]
        assert not engine.loop.run(engine.llm.is_paused())
        engine.loop.run(engine.llm.collective_rpc("keep_prefixes", args=(1,)))
        with pytest.raises(fp8sync.EngineUnusable, match="kept prefixes"):
            link.refit("keep")
        assert engine.loop.run(engine.llm.is_paused())
    engine.close()
