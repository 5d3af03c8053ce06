"""In place: some modules at a time, exact as ever; what fails between them is named, and healed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from vllm.device_allocator import AllocationData
from vllm.device_allocator.cumem import CuMemAllocator

import fp8sync
from fp8sync.engines.vllm import staging
from fp8sync.engines.vllm.buckets import BucketReceiver
from fp8sync.engines.vllm.receive import open_receivers
from fp8sync.transport.memory import allocate
from tests import skips
from tests.engines import world
from tests.engines.test_faults import Wire
from tests.layouts.test_draining import fail_once

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUCKET_BYTES = 1 << 18
"""Of the models here, the largest module and one or two others."""
TRANSPORT = "ipc" if skips.cuda_devices() else "gloo"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = world.tiny_model("dense", 1)
    folder = world.write_config(model, tmp_path_factory.mktemp("engine"))
    llm = world.start_engine(folder, load_format="dummy")
    yield llm
    del llm
    world.forget_engines()


def connect(model: torch.nn.Module, llm: Any, commit: str = "in-place") -> fp8sync.Link:
    options = {"bucket_bytes": BUCKET_BYTES, "timeout_s": 20.0, "transport": "gloo"}
    recipe = world.recipe("blockwise-pow2")
    return fp8sync.connect(model, llm, recipe, commit=commit, **options)


@pytest.mark.parametrize("kind", ["dense", "moe", "tied", "neox"])
def test_equals_a_fresh_load(kind: str, tmp_path: Path) -> None:
    """In turn with staged commits, so that neither leaves anything for the other to stumble on."""
    changes = {"tie_word_embeddings": True} if kind == "tied" else {}
    name = "dense" if kind == "tied" else kind
    fp8 = world.FP8 and kind != "neox"
    formula = None if kind == "neox" else "pow2"
    models = [world.tiny_model(name, seed, **changes) for seed in (1, 2)]
    expected = []
    for number, model in enumerate(models):
        folder = world.write_checkpoint(model, tmp_path / str(number), formula, fp8=fp8)
        fresh = world.start_engine(folder)
        expected.append((world.logprobs(fresh), world.generate(fresh)))
        world.stop_engine(fresh)
    folder = world.write_config(models[0], tmp_path / "config", fp8=fp8)
    llm = world.start_engine(folder, load_format="dummy")
    for turn, commit in ((0, "in-place"), (1, "in-place"), (0, "staged"), (1, "in-place")):
        world.generate(llm)  # fills the prefix cache with the old weights' keys and values
        recipe = "bf16" if kind == "neox" else world.recipe("blockwise-pow2")
        options = {"bucket_bytes": BUCKET_BYTES, "transport": TRANSPORT, "commit": commit}
        with fp8sync.connect(models[turn], llm, recipe, **options) as link:
            stages = ["join", "gather", "learn", "trace", "plan", "open", "ready"]
            assert list(link.connect_s) == stages
            assert {side: set(m.ranks) for side, m in link.manifests.items()} == {
                "trainer": {0},
                "engine": {0},
            }
            portions = link._conductor.portions
            assert (portions > 4) == (commit == "in-place")
            assert link.commit == (
                f"in-place in {portions} portions: asked for"
                if commit == "in-place"
                else "staged: asked for"
            )
            assert re.fullmatch(r"\d+ direct, \d+ by process", link.strategies)
            assert torch.cuda.is_available() or link.strategies.startswith("0 direct, ")
            report = link.refit()
            assert sum(t.bytes for t in report.tensors) == sum(
                c.weight_bytes + c.scale_bytes for c in link.plan.plan.copies
            )
            if kind != "neox":
                assert link.audit().equal
        assert (world.logprobs(llm) - expected[turn][0]).abs().max().item() == 0.0
        assert world.generate(llm) == expected[turn][1]
    del llm
    world.forget_engines()


def test_failure_between_portions_is_named_and_healed(engine: Any) -> None:
    old, new = (world.tiny_model("dense", seed) for seed in (2, 3))
    with connect(new, engine) as link:
        link.refit()
        wanted = world.live_bytes(engine)
    with connect(old, engine) as link:
        link.refit()
        before = world.live_bytes(engine)
    with connect(new, engine) as link:
        portions = link._conductor.portions

        def flip(_: int, message: torch.Tensor) -> None:
            message[64 + 100] ^= 0x10

        meddle_with_portion(link, 3, flip)
        with pytest.raises(fp8sync.EngineUnusable, match=f"3 of {portions} portions") as failure:
            link.refit()
        assert "digest expected" in str(failure.value)
        assert isinstance(failure.value.__cause__, fp8sync.CorruptBucket)
        assert link.version == 0
        assert before != world.live_bytes(engine) != wanted
        assert link.refit().version == 1
        assert world.live_bytes(engine) == wanted


def meddle_with_portion(link: Any, portion: int, change: Any) -> None:
    """Change messages of one portion, for as long as the link is not made anew."""
    sender = link._conductor._member._senders[portion]
    sender._group = Wire(sender._group, change)


def test_processing_that_fails_between_portions(engine: Any) -> None:
    target = "model.layers.1.mlp.down_proj"
    with connect(world.tiny_model("dense", 4), engine) as link:
        link.refit()
        wanted = world.logprobs(engine)
        fp8sync.refit(world.tiny_model("dense", 2), engine, world.recipe("blockwise-pow2"))
        with (
            world.failing_processing(engine, target),
            pytest.raises(fp8sync.EngineUnusable, match="no memory left") as failure,
        ):
            link.refit()
        assert isinstance(failure.value.__cause__, fp8sync.InstallFailed)
        link.refit()
        assert torch.equal(world.logprobs(engine), wanted)


def test_nan_in_the_last_portion_stops_before_the_first_is_installed(engine: Any) -> None:
    model = world.tiny_model("dense", 5)
    with connect(model, engine) as link:
        link.refit()
        before = world.live_bytes(engine)
        with torch.no_grad():
            model.model.norm.weight[3] = torch.nan
            model.lm_head.weight[1, :2] = torch.inf
            model.model.embed_tokens.weight.mul_(2.0)
        with pytest.raises(fp8sync.NonFiniteWeight) as failure:
            link.refit()
        faults = [
            f"{name}.weight (trainer rank 0): expected finite values, found {count} NaN or Inf"
            for name, count in (("model.norm", 1), ("lm_head", 2))
        ]
        assert sorted(failure.value.violations) == sorted(faults)
        assert world.live_bytes(engine) == before
        with torch.no_grad():
            model.model.norm.weight[3] = 1.0
            model.lm_head.weight[1, :2] = 0.0
        assert link.refit().version == 2


def test_no_memory_for_staging_leaves_the_old_weights(engine: Any, monkeypatch: Any) -> None:
    """The allocator refuses what no machine has."""
    model = world.tiny_model("dense", 9)
    with connect(model, engine, "staged") as link:
        link.refit()
        before = world.live_bytes(engine)
        with monkeypatch.context() as patch:
            patch.setattr(staging, "allocate", lambda _, device: allocate(1 << 60, device))
            text = r"engine rank 0: no \d+ bytes of staging memory on c"
            with pytest.raises(fp8sync.InstallFailed, match=text):
                connect(model, engine)
        assert world.live_bytes(engine) == before
        assert link.refit().version == 2


@pytest.mark.parametrize("commit", ["staged", "in-place"])
def test_a_sleeping_engine_is_refused(commit: str, engine: Any, monkeypatch: Any) -> None:
    """vLLM's own record of what it has unmapped says so, which only a GPU's pool fills by itself."""
    model = world.tiny_model("dense", 10)
    pool, text = CuMemAllocator(), r'engine rank 0: .* asleep: call wake_up\(tags=\["weights"\]\)'
    pool.pointer_to_data = {
        0: AllocationData((0, 0, 0, 0), "kv_cache"),
        1: AllocationData((0, 0, 1, 0), "weights"),
    }
    pool.pointer_to_data[0].is_asleep = True
    monkeypatch.setattr(CuMemAllocator, "instance", pool)
    with connect(model, engine, commit) as link:
        link.refit()
        before = world.live_bytes(engine)
        with torch.no_grad():
            model.lm_head.weight.mul_(2.0)
        pool.pointer_to_data[1].is_asleep = True
        for call in (link.refit, link.audit, lambda: connect(model, engine)):
            with pytest.raises(fp8sync.InstallFailed, match=text):
                call()
            assert world.live_bytes(engine) == before
        pool.pointer_to_data[1].is_asleep = False
        link.refit()
        assert world.live_bytes(engine) != before


def test_auto_says_what_it_took_and_why(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = world.tiny_model("dense", 6)
    with connect(model, engine, "auto") as link:
        assert link.commit == "staged: it fits into memory"
    with connect(model, engine, "in-place"):
        pass  # gives back what the staged link reserved
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2_000_000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_000_000, 8_000_000))
    with connect(model, engine, "auto") as link:
        assert link.commit.startswith("in-place in ")
        assert "engine rank 0: staging takes" in link.commit
        assert "0.00 GB are free" in link.commit
        link.refit()


def test_refit_makes_the_link_anew_when_commit_changes(engine: Any) -> None:
    model, recipe = world.tiny_model("dense", 7), world.recipe("blockwise-pow2")
    reports = [
        fp8sync.refit(model, engine, recipe, commit=commit)
        for commit in ("staged", "staged", "in-place", "in-place", "staged")
    ]
    assert [report.version for report in reports] == [1, 2, 1, 2, 1]
    labels = [report.weight_version for report in reports]
    if labels[0] is not None:  # else this vLLM keeps none
        first = int(labels[0])
        assert labels == [str(first + number) for number in range(5)]
    fp8sync.close()


def test_a_worker_whose_second_portion_has_no_memory(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has joined the transport by then, and leaves it with every portion's receiver."""
    model = world.tiny_model("dense", 9)
    opened: list[Any] = []
    closed: list[Any] = []

    def open_noted(*about: Any) -> Any:
        opened.extend(open_receivers(*about))
        return opened

    def close(receiver: BucketReceiver) -> None:
        closed.append(receiver)

    with monkeypatch.context() as patch:
        patch.setattr("fp8sync.engines.vllm.agreement.open_receivers", open_noted)
        patch.setattr(BucketReceiver, "close", close)
        fail_once(patch, "fp8sync.engines.vllm.agreement.ProcessInstall", 1)
        with pytest.raises(
            fp8sync.Fp8SyncError, match="engine rank 0: OutOfMemoryError: no memory"
        ):
            connect(model, engine)
        assert len(opened) > 4
        assert closed[-len(opened) :] == opened[::-1]  # after those of the link before
    with connect(model, engine) as link:
        assert link.refit().version == 1


def test_unknown_and_impossible_commits(engine: Any) -> None:
    model = world.tiny_model("dense", 8)
    with pytest.raises(ValueError, match="unknown commit 'instant'; known: staged, in-place, auto"):
        fp8sync.connect(model, engine, commit="instant")
    with pytest.raises(fp8sync.UnsupportedLayout, match="golden"):
        fp8sync.connect(model, engine, transport="golden", commit="in-place")


def test_recipe_that_fails_leaves_the_link_of_the_old_one(engine: Any) -> None:
    model = world.tiny_model("dense", 3)
    assert fp8sync.refit(model, engine, world.recipe("blockwise")).version == 1
    with pytest.raises(fp8sync.RecipeMismatch):
        fp8sync.refit(model, engine, "bf16" if world.FP8 else "blockwise")
    assert fp8sync.refit(model, engine, world.recipe("blockwise")).version == 1
