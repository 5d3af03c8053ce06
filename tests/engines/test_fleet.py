"""Several engines, each in a process of its own, fed in one refit: all install a version, or none."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from tests.engines import world
from tests.engines.test_faults import Held
from tests.engines.test_processes import torchrun

if TYPE_CHECKING:
    from pathlib import Path


def engine(folder: Path, **options: Any) -> Any:
    return world.start_engine(folder, multiprocess=True, **options)


def kill(llm: Any) -> None:
    (process, *_) = llm.llm_engine.engine_core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGKILL)


def test_two_engines_get_one_version_and_the_loss_of_one_leaves_the_other_as_it_was(
    tmp_path: Path,
) -> None:
    model = world.tiny_model("dense", 1)
    config = world.write_config(model, tmp_path / "config")
    engines = [engine(config, load_format="dummy") for _ in range(2)]
    source = Held(model)
    source.go.set()
    recipe = world.recipe("blockwise-pow2")
    link = fp8sync.connect(source, engines, recipe, timeout_s=30.0)
    report = link.refit()
    copies = link.plan.plan.copies
    assert {copy.destination_rank for copy in copies} == {0, 1}
    assert sum(t.bytes for t in report.tensors) == sum(
        c.weight_bytes + c.scale_bytes for c in copies
    )
    fresh = world.start_engine(world.write_checkpoint(model, tmp_path / "fresh", "pow2"))
    first = world.logprobs(fresh)
    del fresh
    world.forget_engines()
    for llm in engines:
        assert (world.logprobs(llm) - first).abs().max().item() == 0.0

    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    source.go.clear()
    source.asked.clear()

    def kill_the_second() -> None:
        source.asked.wait()
        kill(engines[1])
        source.go.set()

    threading.Thread(target=kill_the_second, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(fp8sync.EngineLost, match="engine 1"):
        link.refit()
    assert time.monotonic() - began < 30.0  # as `timeout_s`
    assert (world.logprobs(engines[0]) - first).abs().max().item() == 0.0
    link.close()

    # Started again, it is fed with the other.
    world.stop_engine(engines[1])
    engines[1] = engine(config, load_format="dummy")
    with fp8sync.connect(source, engines, recipe, timeout_s=30.0) as link:
        link.refit()
    second = world.logprobs(engines[0])
    assert not torch.equal(second, first)
    assert (world.logprobs(engines[1]) - second).abs().max().item() == 0.0

    # The calls that name no link: kept by the list's engines, closed by them.
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(fp8sync.NonFiniteWeight):
        fp8sync.refit(model, engines, recipe)
    for llm in engines:
        assert torch.equal(world.logprobs(llm), second)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 0.0
    assert [fp8sync.refit(model, list(engines), recipe).version for _ in range(2)] == [1, 2]
    fp8sync.close(engine=engines)
    assert fp8sync.refit(model, engines[1], recipe).version == 1
    fp8sync.close()
    with pytest.raises(fp8sync.UnsupportedLayout, match="listed twice"):
        fp8sync.connect(model, [engines[0], engines[0]], recipe)
    for llm in engines:
        world.stop_engine(llm)


def test_two_engines_of_a_trainer_of_two_ranks(tmp_path: Path) -> None:
    """Each rank sends its share to both engines; what one rank finds, stops both."""
    torchrun("tests.engines.fleet_ranks", 2, str(tmp_path))
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert ranks[0]["other"] > 0.0
    assert ranks[0]["difference"] == [0.0, 0.0]
    assert ranks[0]["kept"] == [0.0, 0.0]
    assert [rank["routes"] for rank in ranks] == [
        [[0, 0], [0, 1], [1, 0], [1, 1]],  # rank 0 plans for all
        [[1, 0], [1, 1]],
    ]
    for rank in ranks:
        assert rank["version"] == 1
        assert rank["sent"] > 0
        assert "model.norm.weight (trainer rank 1): expected finite" in rank["error"]


@pytest.mark.parametrize(("intermediate", "whole"), [(384, 6), (512, 0)])
def test_two_engines_of_different_tensor_parallelism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intermediate: int, whole: int
) -> None:
    """Two workers cut 384 rows inside a block, a worker alone does not: all take those tensors whole."""
    workers = 2 if torch.cuda.device_count() != 1 else 1
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(n) for n in range(workers)))
    models = [world.tiny_model("dense", n, intermediate_size=intermediate) for n in (1, 2)]
    fresh = world.write_checkpoint(models[1], tmp_path / "fresh", "pow2", fp8=False)
    engines = [engine(fresh, tensor_parallel_size=workers)]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    engines.append(engine(fresh))
    loaded = [world.logprobs(llm) for llm in engines]
    recipe = fp8sync.Recipe("blockwise-pow2", dequantize=True)
    ways = ({}, {"transport": "golden"}, {"commit": "in-place"})
    for options in ways:
        with fp8sync.connect(models[0], engines, recipe, timeout_s=60.0, **options) as link:
            report = link.refit()
            misc = {t.name for t in report.tensors if t.route == "misc"}
            assert len(misc) == whole * (workers > 1)
            assert all(".mlp." in name for name in misc)
            for llm, expected in zip(engines, loaded, strict=True):
                assert (world.logprobs(llm) - expected).abs().max().item() > 0.0
        with fp8sync.connect(models[1], engines, recipe, timeout_s=60.0, **options) as link:
            link.refit()
            assert link.audit().equal
        for llm, expected in zip(engines, loaded, strict=True):
            assert (world.logprobs(llm) - expected).abs().max().item() == 0.0
    for llm in engines:
        world.stop_engine(llm)
