"""The whole proof as users run it: two trainer ranks, two engine workers, every tensor read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import ports, skips
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


# Workers share the ranks' GPUs where there are no others.
@pytest.mark.multigpu(2 if skips.cuda_devices() else 0)
def test_fsdp2_into_two_workers(tmp_path: Path) -> None:
    # The limits are for trained models. A random one in FP8, activations too, keeps to them only if small
    # weights let its distribution be nearly flat.
    model = world.tiny_model("dense", 1, intermediate_size=512, initializer_range=0.02)
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fp8sync.verify.command", str(tmp_path / "model"), "--trainer", "fsdp2"]
    command += ["--engine-tp", "2", "--rows", "2", "--length", "32", "--steps", "1"]
    command += ["--json", str(tmp_path / "result.json"), "--report", str(tmp_path / "page.html")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # vLLM names by a port what its workers share on the processor, and leaves it behind: both engines that
    # are started here, one after the other, choose theirs among all.
    del environment["VLLM_PORT"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=800)

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failures"] == []
    assert result["fresh_difference"] == 0.0
    assert result["unread"] == {}
    weights = [refit["weights"] for refit in result["refits"]]
    assert weights == ["trained", "junk", "trained", "1 % larger"]
    assert ["agreement" in refit for refit in result["refits"]] == [False, False, True, True]
    assert {tuple(link[:2]) for link in result["links"]} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(trainer == engine for trainer, engine in result["layers"].values())
    assert "1 of 1 kept to every limit" in (tmp_path / "page.html").read_text(encoding="utf-8")


@contextmanager
def host(folder: Path) -> Iterator[None]:
    """An engine's host on an address of its own."""
    port = str(ports.free("127.0.0.3"))
    command = [sys.executable, "-m", "fp8sync.verify.host", str(folder)]
    process = subprocess.Popen([*command, "--address", "127.0.0.3", "--port", port], cwd=ROOT)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def verified(folder: Path, *arguments: str) -> dict[str, Any]:
    """What `fp8sync verify` writes of a model that is served by a host."""
    command = [sys.executable, "-m", "fp8sync.verify.command", str(folder / "model")]
    command += ["--engine-at", str(folder / "engine"), "--host", "127.0.0.2"]
    command += ["--rows", "2", "--length", "32", "--json", str(folder / "result.json"), *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=400)
    result = json.loads((folder / "result.json").read_text())
    assert done.returncode == (0 if "agreement" in result else 1)
    return result


def test_an_engine_elsewhere(tmp_path: Path) -> None:
    """Another process serves it, on another address; first an engine that cannot start."""
    world.tiny_model("dense", 1).save_pretrained(tmp_path / "model")
    with host(tmp_path / "engine"):
        refused = verified(tmp_path, "--kv-cache-dtype", "fp3")
        result = verified(tmp_path)
    assert "fp3" in refused["not_run"]
    assert "agreement" not in refused
    assert result["failures"] == []
    assert result["fresh_difference"] == 0.0
    assert result["unread"] == {}
