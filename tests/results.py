"""A record of tests that ran: `--results FILE` appends a JSON line for each, with what it ran on.

What needs GPUs runs by hand, on machines that are gone afterwards; the file is what is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests import skips

if TYPE_CHECKING:
    import pytest

__all__ = ["Results", "about_here"]

ROOT = Path(__file__).parents[1]


class Results:
    """A plugin of pytest.

    Args:
        path: of the file.
        about: what every line says of machine and code.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._about = path, about

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write what a test came to, and a set-up or tear-down that did not pass."""
        if report.when != "call" and report.passed:
            return
        ended = datetime.fromtimestamp(report.stop, timezone.utc).isoformat(timespec="seconds")
        row = {"test": report.nodeid, "outcome": report.outcome, "when": report.when}
        row |= {"seconds": round(report.duration, 3), "ended": ended, **self._about}
        if report.skipped:
            row["reason"] = skips.reason_of(report)
        with self._path.open("a", encoding="utf-8") as out_file:
            out_file.write(json.dumps(row) + "\n")


def about_here() -> dict[str, Any]:
    """Return the commit, and versions and hardware as `fp8sync doctor` lists them.

    Another process looks: engines start otherwise where this one has used CUDA before.
    """
    look = "import json; from fp8sync.doctor import environment; print(json.dumps(environment()))"
    commit = _said("git", "describe", "--always", "--dirty")
    return {"commit": commit, "versions": json.loads(_said(sys.executable, "-c", look) or "{}")}


def _said(*command: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
