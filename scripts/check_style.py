"""Fails when a module outgrows its limit: 400 lines for one file, a median of 150 for the packages."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

FILE_LIMIT = 400
MEDIAN_LIMIT = 150
PACKAGES = ("fp8sync/", "kernels/")
ROOT = Path(__file__).resolve().parents[1]


def tracked_modules() -> list[str]:
    """Python files that git knows, or would know after `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({name for name in listed.stdout.splitlines() if (ROOT / name).is_file()})


def violations(line_counts: dict[str, int]) -> list[str]:
    """What breaks a limit, worded for a reader; empty when all is well."""
    found = [
        f"{name}: {lines} lines, at most {FILE_LIMIT}"
        for name, lines in line_counts.items()
        if lines > FILE_LIMIT
    ]
    packaged = [lines for name, lines in line_counts.items() if name.startswith(PACKAGES) and lines]
    if packaged and (median := statistics.median(packaged)) > MEDIAN_LIMIT:
        found.append(
            f"fp8sync and kernels: median {median:g} lines a module, at most {MEDIAN_LIMIT}"
        )
    return found


def main() -> int:
    line_counts = {
        name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
        for name in tracked_modules()
    }
    found = violations(line_counts)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
