"""A refit that fails at any stage leaves the old weights serving, and the next refit works."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

import fp8sync
from fp8sync.plan import Planner
from fp8sync.sources import ModuleSource
from tests import skips
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fp8sync.manifest import Manifest

TIMEOUT_S = 4.0


class Held:
    """A trainer that hands out its weights only when told to."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._source = ModuleSource(model)
        self.asked, self.go = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def manifest(self) -> Manifest:
        return self._source.manifest()

    def storages(self) -> Any:
        self.asked.set()
        self.go.wait()
        if self.error is not None:
            raise self.error
        return self._source.storages()


class Wire:
    """The link's own transport, with something done to each message, or another sent in its place."""

    def __init__(
        self, group: Any, meddle: Callable[[int, torch.Tensor], torch.Tensor | None]
    ) -> None:
        self._group, self._meddle, self._count = group, meddle, 0

    def send(self, message: torch.Tensor, to: int) -> None:
        changed = self._meddle(self._count, message)
        self._count += 1
        self._group.send(message if changed is None else changed, to)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = world.tiny_model("dense", 1)
    folder = world.write_config(model, tmp_path_factory.mktemp("engine"))
    llm = world.start_engine(folder, load_format="dummy")
    yield llm
    del llm
    world.forget_engines()


@pytest.fixture
def link(engine: Any) -> Iterator[fp8sync.Link]:
    """A link whose engine serves version 1; small buckets, so that there are many."""
    model = world.tiny_model("dense", 2)
    small: Any = {"timeout_s": TIMEOUT_S, "bucket_bytes": 1 << 18}
    link = fp8sync.connect(model, engine, world.recipe("blockwise"), transport="gloo", **small)
    link.refit()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    yield link
    link.close()


def meddle(link: Any, change: Callable[[int, torch.Tensor], torch.Tensor | None]) -> None:
    (sender,) = link._conductor._member._senders
    sender._group = Wire(sender._group, change)


def mend(link: Any) -> None:
    if link._conductor is not None:
        (sender,) = link._conductor._member._senders
        sender._group = sender._group._group


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("byte", "field"),
    [(64 + 1000, "digest"), (12, "index"), (16, "version"), (24, "payload_bytes"), (40, "plan")],
)
def test_changed_byte(link: fp8sync.Link, byte: int, field: str) -> None:
    def flip(count: int, message: torch.Tensor) -> None:
        if count == 2:
            message[byte] ^= 0x10

    meddle(link, flip)
    with pytest.raises(fp8sync.CorruptBucket, match=rf"engine rank 0, bucket 2: {field} expected"):
        link.refit()
    mend(link)


@pytest.mark.usefixtures("untouched")
def test_reordered_buckets(link: fp8sync.Link) -> None:
    kept: list[torch.Tensor] = []

    def swap(count: int, message: torch.Tensor) -> None:
        if count == 1:
            kept.append(message.clone())
        if count == 2:
            message[: kept[0].numel()] = kept[0][: message.numel()]

    meddle(link, swap)
    with pytest.raises(fp8sync.CorruptBucket, match="index expected 2, found 1"):
        link.refit()
    mend(link)


@pytest.mark.usefixtures("untouched")
def test_truncated_bucket(link: fp8sync.Link) -> None:
    meddle(link, lambda count, message: message[: len(message) // 2] if count == 2 else None)
    with pytest.raises(fp8sync.CorruptBucket, match="engine rank 0, bucket 2: "):
        link.refit()
    mend(link)


@pytest.mark.usefixtures("untouched")
def test_trainer_that_falls_silent(link: fp8sync.Link) -> None:
    """The engine gives up by itself, names the trainer, and takes the next link."""
    meddle(link, lambda count, _: time.sleep(2 * TIMEOUT_S) if count == 1 else None)
    began = time.monotonic()
    with pytest.raises(
        (fp8sync.TransferTimeout, fp8sync.EngineLost),
        match="trainer rank 0 did not send a bucket within 4 s",
    ):
        link.refit()
    assert time.monotonic() - began < 5 * TIMEOUT_S
    mend(link)


@pytest.mark.usefixtures("untouched")
def test_processing_that_fails(engine: Any) -> None:
    """vLLM's own processing raises on the last linear layer, after all others were processed."""
    target = "model.layers.1.mlp.down_proj"
    with world.failing_processing(engine, target):
        # Connected now, so that on a GPU the layer cannot be proven to need no processing.
        link = fp8sync.connect(world.tiny_model("dense", 3), engine, world.recipe("blockwise"))
        where = f"engine rank 0: {target}: "
        with pytest.raises(fp8sync.InstallFailed, match=f"{where}.*no memory left"):
            link.refit()
    link.close()


@pytest.mark.usefixtures("untouched")
def test_trainer_lost_before_the_decision(
    link: fp8sync.Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker has prepared and voted; the trainer hangs up instead of deciding."""
    conductor: Any = link._conductor
    spread = conductor._peers.spread

    def hang_up(role: str, message: dict[str, Any]) -> None:
        if message["type"] == "decision":
            conductor.close()
            raise fp8sync.EngineLost("hung up")
        spread(role, message)

    monkeypatch.setattr(conductor._peers, "spread", hang_up)
    with pytest.raises(fp8sync.EngineLost, match="hung up"):
        link.refit()


@pytest.mark.parametrize(
    ("hang_up", "error", "text"),
    [
        (False, fp8sync.EngineUnusable, "engine rank 0: RuntimeError: the device is lost"),
        (True, fp8sync.EngineLost, "engine rank 0 closed the connection"),
    ],
)
def test_commit_that_fails_after_the_decision(
    engine: Any, link: fp8sync.Link, monkeypatch: Any, hang_up: bool, error: Any, text: str
) -> None:
    """Half of it is installed: said so, and the next refit makes it whole."""
    from fp8sync.engines.vllm.session import WorkerSession

    install = WorkerSession._install

    def fail(session: Any, portion: Any) -> None:
        install(session, portion)
        with torch.no_grad():
            next(session._worker.model.parameters()).zero_()
        if hang_up:
            session._channel.close()
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(WorkerSession, "_install", fail)
        with pytest.raises(error, match="installing failed after the decision") as raised:
            link.refit()
    assert text in str(raised.value)
    assert "refit again before the engine is used" in str(raised.value)
    assert link.version == 1
    broken = world.live_bytes(engine)
    assert link.refit().version == 2
    assert world.live_bytes(engine) != broken
    assert link.audit().equal


@pytest.mark.usefixtures("untouched")
def test_engine_that_cannot_be_paused(link: fp8sync.Link, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str, *, once: bool) -> bool:
        raise RuntimeError("the scheduler is busy")

    with monkeypatch.context() as patch:
        patch.setattr(link._engine, "pause", fail)
        with pytest.raises(fp8sync.Fp8SyncError, match="the scheduler is busy"):
            link.refit()


def test_cache_that_is_not_emptied(engine: Any, link: fp8sync.Link, monkeypatch: Any) -> None:
    """The commit is done by then: the error and the version say that the new weights are there."""
    before = world.logprobs(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "reset_prefix_cache", lambda *_: False)
        with pytest.raises(fp8sync.EngineUnusable, match="the new weights are installed"):
            link.refit()
    assert link.version == 2
    assert not torch.equal(world.logprobs(engine), before)
    assert link.refit().version == 3


def test_what_an_encoder_made_of_a_picture_is_forgotten(engine: Any, link: fp8sync.Link) -> None:
    """A worker keeps it under the picture's hash, for other requests with the same one."""
    engine.collective_rpc(world.keep_a_picture)
    link._engine._encodes = True  # this model does not
    link.refit()
    assert engine.collective_rpc(lambda worker: len(worker.model_runner.encoder_cache)) == [0]


def test_link_that_lost_its_engine_to_another(engine: Any, link: fp8sync.Link) -> None:
    fp8sync.connect(world.tiny_model("dense", 3), engine, world.recipe("blockwise"))
    with pytest.raises(fp8sync.EngineLost, match="another link"):
        link.audit()
    assert link.refit().version == 2
    assert link.audit().equal


def test_source_that_fails(engine: Any) -> None:
    source = Held(world.tiny_model("dense", 3))
    source.go.set()
    link = fp8sync.connect(source, engine, world.recipe("blockwise"), timeout_s=TIMEOUT_S)
    before = world.logprobs(engine)
    source.error = RuntimeError("the parameter buffer was freed")
    with pytest.raises(fp8sync.Fp8SyncError, match=r"trainer rank 0 failed.*was freed"):
        link.refit()
    assert torch.equal(world.logprobs(engine), before)
    source.error = None
    report = link.refit()
    assert report.version == 1
    assert 0.0 < report.host_s < report.seconds["total"]
    assert not torch.equal(world.logprobs(engine), before)
    link.close()


def test_second_refit_while_one_runs(engine: Any) -> None:
    source = Held(world.tiny_model("dense", 3))
    source.go.set()
    link = fp8sync.connect(source, engine, world.recipe("blockwise"), timeout_s=60.0)
    before, digests = world.logprobs(engine), world.live_bytes(engine)
    source.go.clear()
    source.asked.clear()
    reports = []
    first = threading.Thread(target=lambda: reports.append(link.refit()))
    first.start()
    assert source.asked.wait(30)
    with pytest.raises(fp8sync.RefitInProgress):
        link.refit()
    with pytest.raises(fp8sync.RefitInProgress):  # nor through another link
        fp8sync.refit(world.tiny_model("dense", 4), engine, world.recipe("blockwise"))
    assert torch.equal(world.logprobs(engine), before)
    assert world.live_bytes(engine) == digests
    source.go.set()
    first.join()
    assert [r.version for r in reports] == [1]
    link.close()


def test_plans_that_differ(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's version of the code plans one copy otherwise; the worker hears which, too."""
    plan_of = Planner.plan

    def plan(self: Planner, *args: Any) -> Any:
        made = plan_of(self, *args)
        *copies, last = made.copies
        odd = replace(made, copies=(*copies, replace(last, dtype="int8")))
        return odd if "conductor" in threading.current_thread().name else made

    told: list[Any] = []
    monkeypatch.setattr(Planner, "plan", plan)
    tell = "fp8sync.engines.vllm.session.WorkerSession._tell"
    monkeypatch.setattr(tell, lambda _, error: told.append(error))
    before = world.logprobs(engine)
    text = r"engine rank 0 computed another plan.*\n.*weight: first tensor"
    with pytest.raises(fp8sync.PlanMismatch, match=text) as raised:
        fp8sync.connect(world.tiny_model("dense", 3), engine, world.recipe("blockwise"))
    assert [str(error) for error in told] == [str(raised.value)]
    assert torch.equal(world.logprobs(engine), before)
    monkeypatch.undo()
    fp8sync.refit(world.tiny_model("dense", 5), engine, world.recipe("blockwise"))
    assert not torch.equal(world.logprobs(engine), before)


def test_engine_process_killed(tmp_path: Path) -> None:
    model = world.tiny_model("dense", 1)
    folder = world.write_config(model, tmp_path)
    llm = world.start_engine(folder, load_format="dummy", multiprocess=True)
    source = Held(model)
    source.go.set()
    link = fp8sync.connect(source, llm, world.recipe("blockwise"), timeout_s=30.0)
    link.refit()
    source.go.clear()
    source.asked.clear()
    (process, *_) = llm.llm_engine.engine_core.resources.engine_manager.processes

    def kill() -> None:
        source.asked.wait()
        os.kill(process.pid, signal.SIGKILL)
        source.go.set()

    threading.Thread(target=kill, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(
        fp8sync.EngineLost, match=r"vLLM engine died during update_weights|engine rank 0 "
    ):
        link.refit()
    assert time.monotonic() - began < 30.0
    link.close()
    world.stop_engine(llm)


@pytest.mark.multigpu(2 if skips.cuda_devices() else 0)
def test_worker_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two, in the middle of a refit; the engine that takes their place is healed."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = world.tiny_model("dense", 1, intermediate_size=512)
    folder = world.write_config(model, tmp_path)
    options = {"load_format": "dummy", "multiprocess": True, "tensor_parallel_size": 2}
    llm = world.start_engine(folder, **options)
    source = Held(model)
    source.go.set()
    link = fp8sync.connect(source, llm, world.recipe("blockwise"), timeout_s=30.0)
    link.refit()
    expected = world.logprobs(llm)
    source.go.clear()
    source.asked.clear()
    (core, *_) = llm.llm_engine.engine_core.resources.engine_manager.processes
    children = psutil.Process(core.pid).children(recursive=True)
    (worker,) = (p for p in children if "Worker_TP1" in " ".join(p.cmdline()))

    def kill() -> None:
        source.asked.wait()
        worker.kill()
        source.go.set()

    threading.Thread(target=kill, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(fp8sync.EngineLost, match=r"engine rank 1|engine died"):
        link.refit()
    assert time.monotonic() - began < 30.0  # as `timeout_s`
    link.close()
    world.stop_engine(llm)

    llm = world.start_engine(folder, **options)
    with fp8sync.connect(source, llm, world.recipe("blockwise"), timeout_s=30.0) as link:
        link.refit()
    assert (world.logprobs(llm) - expected).abs().max().item() == 0.0
    world.stop_engine(llm)
