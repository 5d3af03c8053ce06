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
import torch.distributed.checkpoint.filesystem  # its modules take memory that is not an export's

from fp8sync.export import export_checkpoint
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.recipe import Recipe
from fp8sync.sources.megatron.records import Records


class Recorded:
    """The tensors of a `torch.distributed.checkpoint` directory, under their own names."""

    def __init__(self, folder: Path) -> None:
        records = Records(folder)
        parts = {n: list(records.parts(n)) for n in records.shapes}
        self._infos = [
            TensorInfo(n, s, str(parts[n][0].tensor.dtype).removeprefix("torch."))
            for n, s in records.shapes.items()
        ]
        self._live = {f"{n}{r.start}": r.tensor for n, held in parts.items() for r in held}
        self._boxes = [
            Box(n, r.start, tuple(r.tensor.shape), Placement(f"{n}{r.start}", 0, r.tensor.stride()))
            for n, held in parts.items()
            for r in held
        ]

    def manifest(self) -> Manifest:
        return Manifest.of(self._infos, {0: self._boxes})

    def storages(self) -> dict[str, torch.Tensor]:
        return self._live


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
    model = Recorded(Path(source)) if (Path(source) / ".metadata").exists() else source
    way = {"config": source, "band_bytes": band_bytes, "progress": False}
    made = export_checkpoint(model, folder, Recipe(recipe), **way)
    done.set()
    watcher.join()
    print(json.dumps({"bytes": made.bytes, "peak_bytes": peak - before}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
