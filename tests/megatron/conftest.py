"""Starts the trainer ranks once for all cases that were asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RANKS = 4
LIMIT_S = 2400

if find_spec("megatron") is None:
    # Megatron needs an environment of its own (requirements/megatron.txt): `make test-megatron`.
    collect_ignore = [path.name for path in HERE.glob("test_*_real.py")]


@pytest.fixture(scope="session")
def faults(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Faults of each selected case, by its name; all cases run in one start of the ranks."""
    cases = [
        item.callspec.params["case"]
        for item in request.session.items
        if "case" in getattr(getattr(item, "callspec", None), "params", {})
    ]
    folder = tmp_path_factory.mktemp("megatron")
    command = [sys.executable, "-W", "ignore", "-m", "tests.megatron.world"]
    ran = subprocess.run(
        [*command, str(folder), str(RANKS), *cases],
        cwd=HERE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    results = folder / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    lost = f"the case did not end (exit {ran.returncode}); the ranks said:\n{ran.stdout[-4000:]}"
    return {case: found.get(case, [lost]) for case in cases}
