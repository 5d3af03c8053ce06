"""Engines of several processes, and trainers of several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fp8sync
from fp8sync.audit import AuditReport
from tests import skips
from tests.engines import world

ROOT = Path(__file__).parents[2]
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_engine_in_a_process_of_its_own(kind: str, tmp_path: Path) -> None:
    """vLLM's usual way: the engine core is another process; equal to an engine fresh in this one."""
    models = [world.tiny_model(kind, seed) for seed in (1, 2)]
    folder = world.write_config(models[0], tmp_path / "config")
    # One of the two as vLLM has it by itself: on the processor, a process more.
    executor = {"distributed_executor_backend": None} if kind == "dense" else {}
    llm = world.start_engine(folder, load_format="dummy", multiprocess=True, **executor)
    for number, model in enumerate(models):
        link = fp8sync.connect(model, llm, world.recipe("blockwise-pow2"))
        assert link.transport.partition(":")[0] == ("ipc" if torch.cuda.is_available() else "gloo")
        report = link.refit()
        assert world.weight_versions(llm) in (None, [report.weight_version])
        checkpoint = world.write_checkpoint(model, tmp_path / str(number), "pow2")
        fresh = world.start_engine(checkpoint)
        assert (world.logprobs(llm) - world.logprobs(fresh)).abs().max().item() == 0.0
        del fresh
        world.forget_engines()
    world.stop_engine(llm)


@pytest.mark.multigpu(2 if skips.cuda_devices() else 0)
def test_experts_and_tied_embeddings_in_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    # Halved between two workers, 256 rows are still whole blocks.
    sizes = {"moe_intermediate_size": 256, "tie_word_embeddings": True}
    models = [world.tiny_model("moe", seed, **sizes) for seed in (1, 2)]
    checkpoint = world.write_checkpoint(models[1], tmp_path, "pow2")
    llm = world.start_engine(checkpoint, multiprocess=True, tensor_parallel_size=2)
    fresh = world.logprobs(llm)
    for model in models:
        fp8sync.refit(model, llm, world.recipe("blockwise-pow2"))
        difference = (world.logprobs(llm) - fresh).abs().max().item()
        assert (difference == 0.0) is (model is models[1])
    world.stop_engine(llm)


def torchrun(module: str, ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=800)


def test_trainer_of_two_ranks_engine_of_two_workers(tmp_path: Path) -> None:
    """Two trainer ranks hold replicas and share the sending; both learn what became of it."""
    workers = 2 if torch.cuda.device_count() != 1 else 1
    torchrun("tests.engines.two_ranks", 2, str(tmp_path), str(workers))
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert ranks[0]["difference"] == 0.0 < ranks[0]["other"]
    assert all(rank["sent"]["bytes"] > 0 for rank in ranks)
    assert all(rank["reported"] == rank["planned"] for rank in ranks)  # over all portions
    assert [rank["version"] for rank in ranks] == [2, 2]
    assert all("cannot refit a object" in rank["refused"] for rank in ranks)
    # NaN was on rank 1 alone: the engine kept its weights, and both ranks were told.
    assert all("(trainer rank 1): expected finite values" in rank["error"] for rank in ranks)
    assert all("(trainer rank 0)" not in rank["error"] for rank in ranks)
    assert ranks[0]["kept"] == 0.0


def test_sharded_trainer_whose_ranks_share_blocks(tmp_path: Path) -> None:
    """FSDP2 on three ranks: they agree on the amax of cut blocks, and nothing is gathered."""
    torchrun("tests.engines.three_ranks", 3, str(tmp_path))
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(3)]
    assert {tuple(team) for team in ranks[0]["teams"]} == {(0, 1), (1, 2)}
    assert ranks[0]["difference"] == 0.0 < ranks[0]["other"]
    assert [rank["version"] for rank in ranks] == [2, 2, 2]
    for rank in ranks:
        # Rank 1 could not take part: the others were told, instead of waiting for it.
        assert "Fp8SyncError: trainer rank 1 failed" in rank["unread"]
        assert "the parameters are offloaded" in rank["unread"]
        assert rank["unread_s"] < 20.0
        assert "NonFiniteWeight" in rank["nonfinite"]
        assert (
            "q_proj.weight (trainer rank 2): expected finite values, found 1" in rank["nonfinite"]
        )
        assert rank["nonfinite"].count("expected finite") == 1
        assert rank["last"] == 3
        assert rank["prepared"] == 1 + 5 + 2
        assert "trainer rank 1 failed" in rank["unaudited"]
        assert rank["audits"] == ranks[0]["audits"]
    equal, changed = (AuditReport.from_json(each) for each in ranks[0]["audits"])
    assert equal.equal
    assert not equal.unread
    assert {d.tensor for d in changed.differences} == {WEIGHT}
    assert changed.differences[0].coordinate == (2 * -(-512 // 3), 5)
    assert ranks[0]["kept"] == 0.0
    assert ranks[0]["again"] == 0.0
