"""Fails when a module outgrows its limit, or leaves a tensor's dtype to the process.

400 lines for one file, a median of 150 for the packages. The default dtype of torch belongs to the
process: a trainer may set it, and a vLLM in the same process does while it loads.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

FILE_LIMIT = 400
MEDIAN_LIMIT = 150
PACKAGES = ("fp8sync/", "kernels/")
OF_DEFAULT_DTYPE = {"empty", "full", "ones", "rand", "randn", "zeros"}
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


def of_default_dtype(name: str, text: str) -> list[str]:
    """Calls in a module that make a tensor of whatever dtype the process has as its default."""
    return [
        f"{name}:{node.lineno}: torch.{node.func.attr} without dtype"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in OF_DEFAULT_DTYPE
        and not any(keyword.arg == "dtype" for keyword in node.keywords)
    ]


def main() -> int:
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in tracked_modules()}
    found = violations({name: len(text.splitlines()) for name, text in texts.items()})
    for name, text in texts.items():
        if name.startswith(PACKAGES):
            found += of_default_dtype(name, text)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
