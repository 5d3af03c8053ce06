"""`--results FILE` keeps a line of each test."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING

import torch

from tests.test_skips import LISTED, run_pytest

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = f"""{LISTED}

def test_that_passes():
    pass

@pytest.fixture
def broken():
    raise RuntimeError

def test_that_cannot_begin(broken):
    pass

def test_that_fails():
    assert False
"""


def test_a_line_for_each_test(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for _ in range(2):  # it is added to
        run_pytest(tmp_path, SOURCE, f"--results={path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [(row["test"].partition("::")[2], row["when"], row["outcome"]) for row in rows]
    once = [
        ("test_it", "setup", "skipped"),
        ("test_that_passes", "call", "passed"),
        ("test_that_cannot_begin", "setup", "failed"),
        ("test_that_fails", "call", "failed"),
    ]
    assert found == once * 2
    assert rows[0]["reason"] == "needs 1 CUDA device(s), found 0"
    assert "reason" not in rows[1]
    for row in rows:
        assert row["versions"]["python"] == platform.python_version()
        assert row["versions"]["torch"] == torch.__version__
        assert row["seconds"] >= 0
        assert row["ended"].endswith("+00:00")
