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
from tests.engines import world

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_engine_in_a_process_of_its_own(kind: str, tmp_path: Path) -> None:
    """vLLM's usual way: the engine core is another process; equal to an engine fresh in this one."""
    models = [world.tiny_model(kind, seed) for seed in (1, 2)]
    folder = world.write_config(models[0], tmp_path / "config")
    llm = world.start_engine(folder, load_format="dummy", multiprocess=True)
    for number, model in enumerate(models):
        link = fp8sync.connect(model, llm, world.recipe("blockwise-pow2"))
        assert link.transport.partition(":")[0] == ("ipc" if torch.cuda.is_available() else "gloo")
        link.refit()
        checkpoint = world.write_checkpoint(model, tmp_path / str(number), "pow2")
        fresh = world.start_engine(checkpoint)
        assert (world.logprobs(llm) - world.logprobs(fresh)).abs().max().item() == 0.0
        del fresh
        world.forget_engines()
    world.stop_engine(llm)


def test_trainer_of_two_ranks_engine_of_two_workers(tmp_path: Path) -> None:
    """Two trainer ranks hold replicas and share the sending; both learn what became of it."""
    workers = 2 if torch.cuda.device_count() != 1 else 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = ["-m", "tests.engines.two_ranks", str(tmp_path), str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *script], cwd=ROOT, env=environment, check=True, timeout=280)
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert ranks[0]["difference"] == 0.0
    assert all(rank["sent"]["bytes"] > 0 for rank in ranks)
    # NaN was on rank 1 alone: the engine kept its weights, and both ranks were told.
    assert all("(trainer rank 1): expected finite values" in rank["error"] for rank in ranks)
    assert all("(trainer rank 0)" not in rank["error"] for rank in ranks)
    assert ranks[0]["kept"] == 0.0
