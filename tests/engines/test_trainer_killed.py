"""Trainer processes killed while they send: the engine serves on, and takes the next trainer's weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from fp8sync.engines.vllm import Server
from tests.engines import serving, world
from tests.engines.killed_trainer import TIMEOUT_S, tall
from tests.engines.test_server import Served

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.engines.killed_trainer", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


@pytest.mark.parametrize("transport", ["gloo", pytest.param("ipc", marks=pytest.mark.gpu)])
def test_only_trainer_of_a_server(transport: str, tmp_path: Path) -> None:
    models = serving.models()
    recipe = world.recipe("blockwise-pow2")
    log = tmp_path / "server.log"
    served = Served(world.write_config(models[0], tmp_path / "config"), log)
    try:
        with fp8sync.connect(models[1], served.url, recipe) as link:
            link.refit()
        before = served.logprobs()
        trainer = start("server", served.url, transport)
        assert trainer.wait(400) == -signal.SIGKILL
        began = time.monotonic()
        # What the dead trainer had installed serves on; of what it was sending, nothing does.
        assert (served.logprobs() - before).abs().max().item() == 0.0
        while not (told := [w for w in log.read_text().splitlines() if "keeps its old" in w]):
            assert time.monotonic() - began < TIMEOUT_S / 2
            time.sleep(0.01)
        assert any("WARNING" in line and "trainer" in line for line in told), told
        with fp8sync.connect(models[0], served.url, recipe, timeout_s=TIMEOUT_S) as link:
            assert link.refit().version == 1
            assert time.monotonic() - began < 3 * TIMEOUT_S
            assert link.audit().equal
        assert (served.logprobs() - before).abs().max().item() > 0.0
    finally:
        served.close()


@pytest.fixture(scope="module")
def tall_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tall")
    served = Served(world.write_config(tall(1), folder), folder / "log", max_model_len=4096)
    with fp8sync.connect(tall(1), served.url, world.recipe("blockwise-pow2")) as link:
        link.refit()
    yield served
    served.close()


def connected(served: Served, call: str) -> subprocess.Popen[bytes]:
    trainer = start("stopped", served.url, call, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"connected\n"
    return trainer


def killed_at(served: Served, call: str) -> None:
    trainer = connected(served, call)
    trainer.communicate(b"\n", 60)
    assert trainer.returncode == -signal.SIGKILL


def reconnected(served: Served, model: torch.nn.Module) -> fp8sync.Link:
    return fp8sync.connect(model, served.url, world.recipe("blockwise-pow2"), timeout_s=TIMEOUT_S)


def test_while_it_waits_for_requests_to_end(tall_server: Served) -> None:
    """As by a scheduler's SIGTERM: they end, and the next trainer lets the server go on."""
    server = Server(tall_server.url)
    before = tall_server.logprobs()
    trainer = connected(tall_server, "none")
    assert trainer.stdin is not None
    with ThreadPoolExecutor(1) as pool:
        tokens = pool.submit(tall_server.greedy, serving.PROMPTS[0], 3000)
        while not (tokens.done() or tall_server.count("requests_running")):
            time.sleep(0.01)
        trainer.stdin.write(b"\n")
        trainer.stdin.flush()
        while not server.paused():
            assert trainer.poll() is None
        trainer.terminate()
        assert trainer.wait(20) == -signal.SIGTERM
        assert not tokens.done()
        assert server.paused()
        with reconnected(tall_server, tall(2)) as link:
            assert not server.paused()
            assert len(tokens.result(60)) == 3000
            assert (tall_server.logprobs() - before).abs().max().item() == 0.0
            link.refit()
            assert not server.paused()
            link.refit()
    assert not server.paused()
    assert (tall_server.logprobs() - before).abs().max().item() > 0.0


@pytest.mark.parametrize("paused", [False, True])
def test_before_it_installs(tall_server: Served, *, paused: bool) -> None:
    """What its owner had paused stays so."""
    server = Server(tall_server.url)
    before = tall_server.logprobs()
    if paused:
        server.pause("keep", once=False)
    killed_at(tall_server, "finish")
    assert server.paused()
    with reconnected(tall_server, tall(1)) as link:
        assert server.paused() is paused
        link.refit()
        assert server.paused() is paused
    server.resume()
    with reconnected(tall_server, tall(2)) as link:
        link.refit()
    assert (tall_server.logprobs() - before).abs().max().item() == 0.0


def test_before_caches_are_empty(tall_server: Served) -> None:
    """Nothing is computed on keys and values of the old weights: it stands until a refit has succeeded."""
    server = Server(tall_server.url)
    broken = tall(1)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.nan
    killed_at(tall_server, "reset_caches")
    with reconnected(tall_server, broken) as link, pytest.raises(fp8sync.NonFiniteWeight):
        link.refit()
    assert server.paused()
    with reconnected(tall_server, tall(1)) as link:
        assert server.paused()
        link.refit()
        assert not server.paused()
        server.pause("keep", once=False)
    with reconnected(tall_server, tall(2)) as link:  # nothing is owed any more
        link.refit()
        assert server.paused()
    server.resume()


def test_one_rank_of_two(tmp_path: Path) -> None:
    ranks = [start("ranks", str(tmp_path), str(rank)) for rank in range(2)]
    assert ranks[1].wait(500) == -signal.SIGKILL
    assert ranks[0].wait(100) == 0
    found = json.loads((tmp_path / "rank0.json").read_text())
    assert found["error"].startswith("EngineLost: trainer rank 1 ")
    assert found["seconds"] < TIMEOUT_S
    assert found["kept"] == 0.0
    assert found["version"] == 1
    assert found["moved"] > 0.0
