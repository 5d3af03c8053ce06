"""Export the shapes of Qwen3-30B-A3B from one GPU, and print what memory and time that takes.

    python -m scripts.bench.export [--layers 48] [--recipe blockwise-pow2] [--device cuda:0] FOLDER

Random BF16 weights; FOLDER needs 31 GB for all layers in FP8, and is left as it is. Host memory is the
growth of anonymous resident pages, device memory what torch had allocated beside the weights. Fails if either
is more than the 40 bands that `export_checkpoint` promises.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import torch

from fp8sync.export import export_checkpoint
from fp8sync.export.directory import DEFAULT_BAND_BYTES
from scripts.bench.qwen30b import RandomQwen

LIMIT = 40 * DEFAULT_BAND_BYTES


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--recipe", default="blockwise-pow2")
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    device = torch.device(options.device)
    source = RandomQwen(options.layers, device)
    config = {"model_type": "qwen3_moe", "num_hidden_layers": options.layers}
    held = _allocated(device)
    peak = before = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    made = export_checkpoint(source, options.folder, options.recipe, config=config, progress=False)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    found = {
        "tensors": made.tensors,
        "in_fp8": made.quantized,
        "bytes": made.bytes,
        "files": made.files,
        "seconds": round(seconds, 2),
        "host_peak_bytes": peak - before,
        "device_peak_bytes": _allocated(device, peak=True) - held,
        "weights_bytes": sum(t.nbytes for t in source.storages().values()),
    }
    print(json.dumps(found))
    if max(found["host_peak_bytes"], found["device_peak_bytes"]) > LIMIT:
        sys.exit(f"more than {LIMIT} bytes")


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def _allocated(device: torch.device, *, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
    return read(device)


if __name__ == "__main__":
    main()
