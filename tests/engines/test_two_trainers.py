"""Two processes and one server: whoever refits it keeps it, and whoever dies at it gives it back."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import fp8sync
from tests.engines import serving, world
from tests.engines.test_server import Served

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 30.0


class Other:
    """`other_trainer` in a process of its own."""

    def __init__(self, url: str, seed: int) -> None:
        command = [sys.executable, "-m", "tests.engines.other_trainer", url, str(seed)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def installs(self) -> str:
        """Let it go on, wherever it is held, until it has refitted; returns the version."""
        self.go_on()
        while (said := self.says()) == "held":
            self.go_on()
        return said

    def go_on(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@contextmanager
def other(url: str, seed: int) -> Iterator[Other]:
    trainer = Other(url, seed)
    try:
        yield trainer
    finally:
        trainer.process.kill()
        trainer.process.wait(20)


def once_free(link: fp8sync.Link, ends: float) -> fp8sync.RefitReport:
    try:
        return link.refit()
    except fp8sync.RefitInProgress:
        assert time.monotonic() < ends
        time.sleep(0.1)
        return once_free(link, ends)


@pytest.mark.usefixtures("one_thread")
def test_one_refits_at_a_time(tmp_path: Path) -> None:
    model = serving.models()[0]
    served = Served(world.write_config(model, tmp_path))
    try:
        recipe = world.recipe("blockwise-pow2")
        link = fp8sync.connect(model, served.url, recipe, timeout_s=TIMEOUT_S)
        link.refit()
        mine = served.logprobs()
        with other(served.url, 1) as trainer:
            assert trainer.says() == "held"
            named = rf"being refitted by process {trainer.process.pid} of "
            with pytest.raises(fp8sync.RefitInProgress, match=named):
                link.refit()
            with pytest.raises(fp8sync.RefitInProgress, match=named):
                fp8sync.connect(model, served.url, recipe, timeout_s=TIMEOUT_S)
            assert torch.equal(served.logprobs(), mine)
            assert trainer.installs() == "1"
            theirs = served.logprobs()
            assert not torch.equal(theirs, mine)
            # In turn, each takes the engine back from the other.
            assert link.refit().version == 2
            assert torch.equal(served.logprobs(), mine)
            trainer.go_on()
            assert trainer.says() == "held"
            with pytest.raises(fp8sync.EngineLost, match="another link has taken"):
                link.audit()
            assert trainer.installs() == "2"
            assert torch.equal(served.logprobs(), theirs)
            trainer.go_on()
            assert trainer.says() == "held"
            trainer.process.kill()
            trainer.process.wait(20)
        # It died at it: its version was never installed, and the engine is free once that is noticed.
        assert torch.equal(served.logprobs(), theirs)
        assert once_free(link, time.monotonic() + TIMEOUT_S / 2).version == 3
        assert torch.equal(served.logprobs(), mine)
        link.close()
    finally:
        served.close()
