"""An AsyncLLM that generates through a refit, in each mode for requests in flight."""

from __future__ import annotations

import asyncio
import itertools
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from fp8sync.engines.vllm import compat
from tests import skips
from tests.engines import serving, world
from tests.engines.sabotage import SABOTAGE, slowed
from tests.engines.test_in_place import meddle_with_portion
from tests.engines.test_kv_scales import scales

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from contextlib import AbstractContextManager
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

_ids = itertools.count()


class Engine:
    """An AsyncLLM in a loop thread."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.loop = serving.LoopThread()
        self.llm = self.loop.run(self._start(folder, **options))

    async def _start(self, folder: Path, **options: Any) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = serving.settings(folder, **SABOTAGE, **options)
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

    async def stream(self, prompt: list[int], tokens: int) -> serving.Sample:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        async for output in self.llm.generate(
            {"prompt_token_ids": prompt}, params, f"r{next(_ids)}"
        ):
            (last,) = output.outputs
        return list(last.token_ids), last.finish_reason

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        return self.loop.run(self.stream(prompt, tokens))[0]

    def begun(self, prompt: list[int], tokens: int) -> Future[serving.Sample]:
        """A stream that has some of its tokens."""
        (stream,) = self.all_begun([prompt], tokens)
        return stream

    def all_begun(self, prompts: list[list[int]], tokens: int) -> list[Future[serving.Sample]]:
        """Streams that have some of their tokens, each; the engine has none but these."""
        streams = [self.loop.begin(self.stream(prompt, tokens)) for prompt in prompts]
        while not any(stream.done() for stream in streams):
            if len(counts := self._counts()) >= len(streams) and all(counts):
                break
            time.sleep(0.01)
        return streams

    def slow(self) -> AbstractContextManager[None]:
        return slowed(lambda name, *args: self.loop.run(self.llm.collective_rpc(name, args=args)))

    def pausing(self, mode: str) -> Future[None]:
        """Its owner's pause, once vLLM calls itself paused; requests may be stepped all the same."""
        pause = self.loop.begin(self.llm.pause_generation(mode=mode))
        while not self.loop.run(self.llm.is_paused()):
            time.sleep(0.01)
        return pause

    def written(self) -> int:
        """Tokens of all streams that are under way."""
        return sum(self._counts())

    def _counts(self) -> list[int]:
        states = list(self.llm.output_processor.request_states.values())
        return [len(state.detokenizer.output_token_ids) for state in states if state.detokenizer]

    def logprobs(self, data_parallel_rank: int | None = None) -> torch.Tensor:
        return self.loop.run(self._logprobs(data_parallel_rank))

    async def _logprobs(self, replica: int | None) -> torch.Tensor:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=256, detokenize=False)
        prompt = {"prompt_token_ids": world.PROMPT}
        name = f"r{next(_ids)}"
        async for output in self.llm.generate(prompt, params, name, data_parallel_rank=replica):
            last = output
        return world.rows_of(last.prompt_logprobs)

    def close(self) -> None:
        fp8sync.close(engine=self.llm)  # while what they wrote to is still there
        self.llm.shutdown(timeout=world.END_S)
        self.loop.close()


@pytest.fixture(scope="module")
def engine(
    models: list[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    folder = world.write_config(models[0], tmp_path_factory.mktemp("engine"))
    engine = Engine(folder)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def fresh(
    models: list[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> list[torch.Tensor]:
    """Log-probabilities of fresh engines of both models."""
    found = []
    for model in models:
        llm = world.start_engine(
            world.write_checkpoint(model, tmp_path_factory.mktemp("fresh"), "pow2")
        )
        found.append(world.logprobs(llm))
        del llm
        world.forget_engines()
    return found


@pytest.mark.parametrize("mode", ["wait", "keep", "recompute", "abort"])
def test_requests_in_flight(
    engine: Engine, models: list[torch.nn.Module], fresh: list[torch.Tensor], mode: str
) -> None:
    recipe = world.recipe("blockwise-pow2")
    fp8sync.refit(models[0], engine.llm, recipe)
    assert (engine.logprobs() - fresh[0]).abs().max().item() == 0.0
    old = serving.greedy(engine.greedy)
    fp8sync.refit(models[1], engine.llm, recipe)  # both links exist; the next one reconnects
    last = fp8sync.refit(models[0], engine.llm, recipe).weight_version
    found, report = engine.loop.run(
        serving.refit_under_load(
            engine.stream, lambda: fp8sync.refit(models[1], engine.llm, recipe, in_flight=mode)
        )
    )
    assert (engine.logprobs() - fresh[1]).abs().max().item() == 0.0
    # Through the prefix cache, too: nothing of the old version is left in it.
    new = serving.greedy(engine.greedy)
    serving.judge(mode, found, old, new, engine.greedy)
    engine.loop.run(engine.llm.reset_prefix_cache())
    assert new == serving.greedy(engine.greedy)
    label = getattr(engine.llm, "get_weight_version", None)
    assert report.weight_version == (engine.loop.run(label()) if label else None)
    assert last is None or report.weight_version == str(int(last) + 1)


@pytest.mark.multigpu(2 if skips.cuda_devices() else 0)
def test_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams through two refits, and what both workers hold afterwards."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    # Halved between two workers, 512 rows are still whole blocks.
    sizes = {"intermediate_size": 512, "max_position_embeddings": 512}
    models = [world.tiny_model("dense", seed, **sizes) for seed in (1, 2)]
    engine = Engine(world.write_config(models[0], tmp_path), tensor_parallel_size=2)
    recipe = world.recipe("blockwise-pow2")
    fp8sync.refit(models[0], engine.llm, recipe)
    old = serving.greedy(engine.greedy)
    for mode, model in (("wait", models[1]), ("keep", models[0])):
        with fp8sync.connect(model, engine.llm, recipe) as link:
            load = serving.refit_under_load(engine.stream, partial(link.refit, mode))
            found, _ = engine.loop.run(load)
            assert link.audit().equal
        new = serving.greedy(engine.greedy)
        assert new != old
        serving.judge(mode, found, old, new, engine.greedy)
        old = new
    engine.close()


def test_a_label_that_is_set_by_hand_is_followed(
    engine: Engine, models: list[torch.nn.Module]
) -> None:
    """On a link that is kept, too: the number after it, and 1 after a name."""
    labels = hasattr(engine.llm, "update_weight_version")
    with fp8sync.connect(models[0], engine.llm, world.recipe("blockwise-pow2")) as link:
        link.refit()
        for by_hand, then in (("100", "101"), ("mine", "1"), ("7", "8")):
            if labels:
                engine.loop.run(engine.llm.update_weight_version(by_hand))
            assert link.refit().weight_version == (then if labels else None)


def test_kept_between_two_steps(
    models: list[torch.nn.Module],
    fresh: list[torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a prefix cache and a label there is nothing to pause for: no stream is lost or redone."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the engine was paused")

    engine = Engine(world.write_config(models[0], tmp_path), enable_prefix_caching=False)
    link = fp8sync.connect(models[0], engine.llm, world.recipe("blockwise-pow2"))
    link.refit()
    old = serving.greedy(engine.greedy)
    link.close()
    link = fp8sync.connect(models[1], engine.llm, world.recipe("blockwise-pow2"))
    link._engine._labels = False  # as before vLLM 0.27
    with monkeypatch.context() as patch:
        patch.setattr(compat, "pause", refuse)
        found, report = engine.loop.run(
            serving.refit_under_load(engine.stream, lambda: link.refit("keep"))
        )
    assert (engine.logprobs() - fresh[1]).abs().max().item() == 0.0
    new = serving.greedy(engine.greedy)
    mixed = 0
    for samples, before, after in zip(found, old, new, strict=True):
        for tokens, reason in samples:
            assert (reason, len(tokens)) == ("length", len(before))
            if tokens not in (before, after):
                mixed += 1
                assert tokens[0] == before[0]
    assert mixed
    assert 0 < report.pause_s < report.seconds["total"]
    link._engine._encodes = True  # what a model has seen of pictures is forgotten in a pause
    assert link._engine.pause("keep", once=True) is not None
    link._engine.resume()
    link.close()
    engine.close()


def test_kept_requests_are_recomputed_under_new_scales(
    models: list[torch.nn.Module], tmp_path: Path
) -> None:
    """What an FP8 cache without prefixes holds was divided by other scales: none of it is read again."""
    options = {"enable_prefix_caching": False, "kv_cache_dtype": "fp8"}
    engine = Engine(world.write_config(models[0], tmp_path), **options)
    recipe = world.recipe("blockwise-pow2")
    fp8sync.refit(models[0], engine.llm, recipe, kv_scales=scales(0))
    old = serving.greedy(engine.greedy)
    with fp8sync.connect(models[1], engine.llm, recipe, kv_scales=scales(1)) as link:
        found, _ = engine.loop.run(
            serving.refit_under_load(engine.stream, lambda: link.refit("keep"))
        )
    serving.judge("recompute", found, old, serving.greedy(engine.greedy), engine.greedy)
    engine.close()


def in_place(model: torch.nn.Module, engine: Engine) -> fp8sync.Link:
    recipe = world.recipe("blockwise-pow2")
    options = {"commit": "in-place", "bucket_bytes": 1 << 18, "transport": "gloo"}
    return fp8sync.connect(model, engine.llm, recipe, **options)


def test_in_place_while_requests_are_frozen(
    engine: Engine,
    models: list[torch.nn.Module],
    fresh: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They see no portion, whichever link fails, until one has installed all: then they go on with that."""
    fp8sync.refit(models[0], engine.llm, world.recipe("blockwise-pow2"))
    old = serving.greedy(engine.greedy)

    def flip(_: int, message: torch.Tensor) -> None:
        message[64 + 100] ^= 0x10

    def busy(_: str, *, once: bool) -> bool:
        raise RuntimeError("the scheduler is busy")

    def fail_in_pause(link: fp8sync.Link) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(link._engine, "pause", busy)
            with pytest.raises(fp8sync.Fp8SyncError, match="is busy"):
                link.refit()

    def refit() -> fp8sync.RefitReport:
        meddle_with_portion(link, 2, flip)
        with pytest.raises(fp8sync.EngineUnusable, match="2 of"):
            link.refit("keep")
        assert engine.loop.run(engine.llm.is_paused())
        with in_place(models[1], engine) as other:
            assert other._conductor.portions > 4
            fail_in_pause(other)
            assert engine.loop.run(engine.llm.is_paused())
            report = other.refit()
        fail_in_pause(link)  # which finds that the engine is whole again
        assert not engine.loop.run(engine.llm.is_paused())
        return report

    with in_place(models[1], engine) as link:
        found, _ = engine.loop.run(serving.refit_under_load(engine.stream, refit))
    assert (engine.logprobs() - fresh[1]).abs().max().item() == 0.0
    serving.judge("keep", found, old, serving.greedy(engine.greedy), engine.greedy)


def test_an_engine_that_failed_to_install_generates_nothing(
    engine: Engine,
    models: list[torch.nn.Module],
    fresh: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests that queue up see no mixture, nor prefixes of the old version."""
    recipe = world.recipe("blockwise-pow2")
    fp8sync.refit(models[0], engine.llm, recipe)
    old = serving.greedy(engine.greedy)

    async def refuse(*_: Any) -> bool:
        return False

    def refit() -> fp8sync.RefitReport:
        engine.loop.run(engine.llm.collective_rpc("fail_to_install"))
        with pytest.raises(fp8sync.EngineUnusable, match="after the decision"):
            link.refit()
        assert (link.version, engine.loop.run(engine.llm.is_paused())) == (0, True)
        with monkeypatch.context() as patch:
            patch.setattr(engine.llm, "reset_prefix_cache", refuse)
            with pytest.raises(fp8sync.EngineUnusable, match="kept prefixes"):
                link.refit()
        assert (link.version, engine.loop.run(engine.llm.is_paused())) == (1, True)
        return link.refit()

    with fp8sync.connect(models[1], engine.llm, recipe) as link:
        found, _ = engine.loop.run(serving.refit_under_load(engine.stream, refit))
    assert not engine.loop.run(engine.llm.is_paused())
    assert (engine.logprobs() - fresh[1]).abs().max().item() == 0.0
    serving.judge("wait", found, old, serving.greedy(engine.greedy), engine.greedy)


def test_called_in_its_own_loop(engine: Engine, models: list[torch.nn.Module]) -> None:
    """It would wait for itself for ever; refused instead."""

    async def call() -> None:
        fp8sync.connect(models[0], engine.llm, world.recipe("blockwise"))

    with pytest.raises(fp8sync.Fp8SyncError, match=r"asyncio\.to_thread"):
        engine.loop.run(call())


def test_unknown_mode(engine: Engine, models: list[torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match="known: wait, keep, recompute, abort"):
        fp8sync.refit(models[0], engine.llm, world.recipe("blockwise"), in_flight="drop")


def test_requests_that_do_not_end(
    engine: Engine,
    models: list[torch.nn.Module],
    fresh: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`wait` gives up in time: the old weights serve on, the requests too, and the link stays."""
    link = fp8sync.connect(models[0], engine.llm, world.recipe("blockwise-pow2"))
    link.refit()
    with torch.no_grad():
        kept = models[0].lm_head.weight.clone()
        models[0].lm_head.weight.mul_(1.5)
    handle = link._engine
    patient_s, pause = handle.timeout_s, handle.pause

    def pause_impatiently(mode: str, *, once: bool) -> float | None:
        handle.timeout_s = 1e-3
        try:
            with engine.slow():
                return pause(mode, once=once)
        finally:
            handle.timeout_s = patient_s

    async def run() -> Any:
        monkeypatch.setattr(handle, "pause", pause_impatiently)
        with pytest.raises(fp8sync.TransferTimeout, match="did not answer pause"):
            await serving.refit_under_load(engine.stream, link.refit)
        monkeypatch.undo()
        return await asyncio.wait_for(engine.stream(serving.PROMPTS[0], 8), 60)

    tokens, reason = engine.loop.run(run())
    assert (len(tokens), reason) == (8, "length")
    assert (engine.logprobs() - fresh[0]).abs().max().item() == 0.0
    assert link.refit().version == 2
    with torch.no_grad():
        models[0].lm_head.weight.copy_(kept)
    link.close()
