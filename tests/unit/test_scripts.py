"""What no other test runs: benchmarks import, and say what they take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("vllm_load", "vllm_refit", "kernels", "export")


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    command = [sys.executable, "-m", f"scripts.bench.{name}", "--help"]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "usage" in found.stdout
