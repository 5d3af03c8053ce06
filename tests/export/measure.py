"""Exports one matrix in a process of its own, and prints what memory that took.

    python -m tests.export.measure SOURCE FOLDER RECIPE BAND_BYTES

Prints a JSON object: bytes written, and by how much anonymous memory grew at most. Pages of mapped
files are not counted: the system drops them as it needs.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch

from fp8sync.export import export_checkpoint
from fp8sync.recipe import Recipe


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(kib) * 1024


def main(source: str, folder: str, recipe: str, band_bytes: int) -> None:
    torch.set_num_threads(1)
    peak = before = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    made = export_checkpoint(source, folder, Recipe(recipe), band_bytes=band_bytes, progress=False)
    done.set()
    watcher.join()
    print(json.dumps({"bytes": made.bytes, "peak_bytes": peak - before}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
