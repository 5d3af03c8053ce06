"""Refit a live vLLM with the shapes of Qwen3-30B-A3B, full size, from one GPU to another.

    python -m scripts.bench.vllm_refit [--layers 48] [--refits 10] [--native 2] [--trainer-gpu 1]

vLLM runs on GPU 0 in its own process (load_format="dummy"), the trainer's random BF16 weights lie on
GPU 1, or on GPU 0 as well (not with --native). Prints one line per refit and the medians, with the wire's bandwidth as measured by
a copy of 1 GiB in the same run; --native measures vLLM's own NCCL transfer of an FP8 checkpoint of
the same shapes first.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import fp8sync
from scripts.bench import qwen30b


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--refits", type=int, default=10)
    parser.add_argument("--misc", type=int, default=0, help="refits with scales='misc' to add")
    parser.add_argument("--native", type=int, default=0, help="native transfers to measure first")
    parser.add_argument("--trainer-gpu", type=int, default=1, help="0: beside the engine")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    gpu = torch.device("cuda", options.trainer_gpu)
    wire = copy_bandwidth(gpu)
    print(f"copy of 1 GiB, {gpu} -> cuda:0: {wire / 1e9:.0f} GB/s", flush=True)
    source = qwen30b.RandomQwen(options.layers, gpu)
    torch.cuda.set_device(gpu)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        qwen30b.write_folder(folder, options.layers)
        native = measure_native(folder, source, options.native) if options.native else []
        llm = start(folder, "fp8sync")
        began = time.perf_counter()
        link = fp8sync.connect(source, llm, "blockwise-pow2")
        connect_s = time.perf_counter() - began
        print(f"connect: {connect_s:.2f} s; {link.transport}")
        print(link.plan.explain().splitlines()[0])
        rows = [refit(link) for _ in range(options.refits)]
        if options.misc:
            print("scales='misc':")
            link = fp8sync.connect(source, llm, "blockwise-pow2", scales="misc")
        misc = [refit(link) for _ in range(options.misc)]
        llm.llm_engine.engine_core.shutdown()
    keys = ("total", "quantize", "verify", "prepare", "commit", "pause")
    medians = {key: statistics.median(row[key] for row in rows[1:]) for key in keys}
    floor = rows[0]["bytes"] / wire
    print("median of all but the first: " + ", ".join(f"{k} {v:.4f} s" for k, v in medians.items()))
    print(f"wire floor {floor:.4f} s; total / floor = {medians['total'] / floor:.2f}")
    if native:
        print("vLLM's own NCCL transfer: " + ", ".join(f"{s:.2f} s" for s in native))
    if options.out:
        record = {"wire_bytes_per_s": wire, "layers": options.layers, "connect_s": connect_s}
        record |= {"native_s": native, "rows": rows, "misc_rows": misc}
        options.out.write_text(json.dumps(record) + "\n")


def start(folder: Path, backend: str) -> Any:
    """A `vllm.LLM` on GPU 0, in its usual engine process."""
    from vllm import LLM

    began = time.perf_counter()
    llm = LLM(**qwen30b.options(folder, backend))
    print(f"engine with backend {backend}: {time.perf_counter() - began:.0f} s", flush=True)
    return llm


def refit(link: Any) -> dict[str, float]:
    """One refit and its line."""
    began = time.perf_counter()
    report = link.refit()
    total = time.perf_counter() - began
    row = {**report.seconds, "pause": report.pause_s, "bytes": report.bytes_sent, "total": total}
    print(" ".join(f"{key}={value:.4f}" for key, value in row.items()), flush=True)
    return row


def measure_native(folder: Path, source: qwen30b.RandomQwen, count: int) -> list[float]:
    """Seconds of vLLM's own packed NCCL transfer, its update calls included (vLLM 0.25)."""
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerSendWeightsArgs,
        NCCLWeightTransferEngine,
    )

    llm = start(folder, "nccl")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    place = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2}
    joining = beside(
        lambda: llm.init_weight_transfer_engine({"init_info": {**place, "rank_offset": 1}})
    )
    group = NCCLWeightTransferEngine.trainer_init(place)
    joining.join()
    tensors = list(qwen30b.checkpoint_tensors(source))
    info = {
        "names": [name for name, _ in tensors],
        "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in tensors],
        "shapes": [list(t.shape) for _, t in tensors],
        "packed": True,
    }
    nbytes = sum(t.numel() * t.element_size() for _, t in tensors)
    print(f"native: {len(tensors)} tensors, {nbytes / 1e9:.2f} GB")
    arguments = NCCLTrainerSendWeightsArgs(group=group, packed=True)
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        llm.start_weight_update()
        updating = beside(lambda: llm.update_weights({"update_info": info}))
        NCCLWeightTransferEngine.trainer_send_weights(iter(tensors), arguments)
        torch.cuda.synchronize()
        updating.join()
        llm.finish_weight_update()
        seconds.append(time.perf_counter() - began)
        print(f"native: {seconds[-1]:.2f} s", flush=True)
    llm.llm_engine.engine_core.shutdown()
    return seconds


def beside(call: Any) -> threading.Thread:
    """Run one of vLLM's blocking calls in another thread."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def copy_bandwidth(gpu: torch.device) -> float:
    """Bytes per second of a large copy to GPU 0, counted once (median of 10)."""
    there = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    here = torch.empty(1 << 30, dtype=torch.uint8, device=gpu)
    seconds = []
    for _ in range(12):
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(gpu)
        began = time.perf_counter()
        there.copy_(here)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(gpu)
        seconds.append(time.perf_counter() - began)
    return (1 << 30) / statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
