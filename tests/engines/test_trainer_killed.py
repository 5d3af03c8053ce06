"""Trainer processes killed while they send: the engine serves on, and takes the next trainer's weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fp8sync
from tests.engines import serving, world
from tests.engines.killed_trainer import TIMEOUT_S
from tests.engines.test_server import Served

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.engines.killed_trainer", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_only_trainer_of_a_server(tmp_path: Path) -> None:
    models = serving.models()
    recipe = world.recipe("blockwise-pow2")
    log = tmp_path / "server.log"
    served = Served(world.write_config(models[0], tmp_path / "config"), log)
    try:
        with fp8sync.connect(models[1], served.url, recipe) as link:
            link.refit()
        before = served.logprobs()
        trainer = start("server", served.url)
        assert trainer.wait(200) == -signal.SIGKILL
        began = time.monotonic()
        # What the dead trainer had installed serves on; of what it was sending, nothing does.
        assert (served.logprobs() - before).abs().max().item() == 0.0
        told = [line for line in log.read_text().splitlines() if "keeps its old weights" in line]
        assert any("WARNING" in line and "trainer" in line for line in told), told
        with fp8sync.connect(models[0], served.url, recipe, timeout_s=TIMEOUT_S) as link:
            assert link.refit().version == 1
            assert time.monotonic() - began < 3 * TIMEOUT_S
            assert link.audit().equal
        assert (served.logprobs() - before).abs().max().item() > 0.0
    finally:
        served.close()


def test_one_rank_of_two(tmp_path: Path) -> None:
    ranks = [start("ranks", str(tmp_path), str(rank)) for rank in range(2)]
    assert ranks[1].wait(250) == -signal.SIGKILL
    assert ranks[0].wait(100) == 0
    found = json.loads((tmp_path / "rank0.json").read_text())
    assert found["error"].startswith("EngineLost: trainer rank 1 ")
    assert found["seconds"] < TIMEOUT_S
    assert found["kept"] == 0.0
    assert found["version"] == 1
    assert found["moved"] > 0.0
