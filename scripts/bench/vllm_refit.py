"""Refit a live vLLM with the shapes of Qwen3-30B-A3B, full size.

    python -m scripts.bench.vllm_refit [--refits 10] [--native 2]
    python -m scripts.bench.vllm_refit --trainer-gpus 0 [--offload] [--sleep 2] [--layers 24]
    python -m torch.distributed.run --nproc-per-node 2 -m scripts.bench.vllm_refit --engine-tp 2 [--trainer-gpus 1 0]

vLLM runs on the first GPUs in processes of its own (load_format="dummy"). The trainer's random BF16 weights lie on
the GPUs after them, cut in as many parts as it has ranks; or on those named, beside the engine; or, with
--offload, in pinned memory of the host. --sleep lets the engine sleep before each refit, and wakes first its weights, then its KV
cache. Prints one line per refit and the medians, with bandwidths measured by copies of 1 GiB in the same run, and
the issue's goals computed from these; --native measures vLLM's own NCCL transfer of an FP8 checkpoint of the same
shapes first (one trainer rank, one worker).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fp8sync
from fp8sync.engines.vllm import without_torchrun
from scripts.bench import qwen30b

ENGINE = torch.device("cuda", 0)


def main() -> None:
    """Run the benchmark; on a trainer of several ranks, one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--refits", type=int, default=10)
    parser.add_argument("--misc", type=int, default=0, help="refits with scales='misc' to add")
    parser.add_argument("--native", type=int, default=0, help="native transfers to measure first")
    parser.add_argument("--engine-tp", type=int, default=1, help="workers of the engine")
    parser.add_argument("--trainer-gpus", type=int, nargs="+", help="of each rank")
    parser.add_argument("--offload", action="store_true", help="the trainer's weights on the host")
    parser.add_argument("--sleep", type=int, default=0, help="level, before each refit")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    options.trainer_gpus = options.trainer_gpus or [options.engine_tp + n for n in range(ranks)]
    gpu = torch.device("cuda", options.trainer_gpus[rank])
    torch.cuda.set_device(gpu)
    wire, local = copy_bandwidth(gpu, ENGINE), 2 * copy_bandwidth(gpu, gpu)
    host = copy_bandwidth(torch.device("cpu"), gpu) if options.offload else 0.0
    source = qwen30b.RandomQwen(options.layers, gpu, rank, ranks, offload=options.offload)
    if rank == 0:
        print(f"copy of 1 GiB, {gpu} -> {ENGINE}: {wire / 1e9:.0f} GB/s, on {gpu}: ", end="")
        print(
            f"{local / 1e9:.0f} GB/s read and written, from the host: {host / 1e9:.1f}", flush=True
        )
        lead(options, source, wire, local, host)
        return
    link = fp8sync.connect(source, None, "blockwise-pow2", timeout_s=300)  # rank 0 starts an engine
    for _ in range(options.refits):
        link.refit()


def lead(
    options: argparse.Namespace,
    source: qwen30b.RandomQwen,
    wire: float,
    local: float,
    host: float,
) -> None:
    """Measure, on the trainer rank that holds the engine.

    Args:
        options: of the command.
        source: this rank's weights.
        wire: bytes per second to the engine's first GPU.
        local: bytes per second on one GPU, read and written.
        host: bytes per second from pinned memory to this rank's GPU; 0 where it was not measured.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        qwen30b.write_folder(folder, options.layers)
        native = measure_native(folder, source, options.native) if options.native else []
        llm = start(folder, "fp8sync", options.engine_tp, sleep=bool(options.sleep))
        began = time.perf_counter()
        link = fp8sync.connect(source, llm, "blockwise-pow2")
        connect_s = time.perf_counter() - began
        stages = link.connect_s
        print(
            f"connect: {connect_s:.2f} s, " + ", ".join(f"{k} {v:.2f}" for k, v in stages.items())
        )
        print(link.transport)
        print(link.plan.explain().splitlines()[0], flush=True)
        rows = [refit(link, llm, options.sleep) for _ in range(options.refits)]
        if options.misc:
            print("scales='misc':")
            link = fp8sync.connect(source, llm, "blockwise-pow2", scales="misc")
        misc = [refit(link, llm, options.sleep) for _ in range(options.misc)]
        llm.llm_engine.engine_core.shutdown()
    keys = ("total", "quantize", "verify", "prepare", "commit", "pause", "host")
    medians = {key: statistics.median(row[key] for row in rows[1:]) for key in keys}
    shard = rows[0]["bytes"] / options.engine_tp
    print("median of all but the first: " + ", ".join(f"{k} {v:.4f} s" for k, v in medians.items()))
    print(
        f"wire floor {shard / wire:.4f} s; total / floor = {medians['total'] / (shard / wire):.2f}"
    )
    goals = {
        "refit": (medians["total"], 0.12),
        "pause": (medians["pause"], 1.3 * 2 * shard / local + 3e-3),
        "connect and first refit": (connect_s + rows[0]["total"], 10.0),
        "host": (medians["host"], 2e-3),
    }
    for name, (found, most) in goals.items():
        print(f"{name}: {found:.4f} s, goal {most:.4f}: {'reached' if found <= most else 'MISSED'}")
    if options.offload:
        read = source.nbytes / medians["quantize"]
        print(f"quantize: {read / 1e9:.1f} GB/s, {read / host:.0%} of the copy from the host")
    elif options.trainer_gpus == [0]:
        moved = source.nbytes + rows[0]["bytes"]
        print(f"quantize: {moved / medians['quantize'] / local:.0%} of the copy bandwidth")
    if native:
        print("vLLM's own NCCL transfer: " + ", ".join(f"{s:.2f} s" for s in native))
    if options.out:
        record = {"options": {**vars(options), "out": None}, "wire_bytes_per_s": wire}
        record |= {
            "copy_bytes_per_s": local,
            "host_bytes_per_s": host,
            "connect_s": connect_s,
            "connect_stages": stages,
        }
        record |= {"native_s": native, "rows": rows, "misc_rows": misc}
        options.out.write_text(json.dumps(record) + "\n")
    assert medians["host"] <= goals["host"][1], "the host's own time is above its goal"


def start(folder: Path, backend: str, workers: int = 1, *, sleep: bool = False) -> Any:
    """A `vllm.LLM` on the first GPUs, in its usual engine process."""
    began = time.perf_counter()
    more = {"tensor_parallel_size": workers, "enable_sleep_mode": sleep}
    with without_torchrun():
        from vllm import LLM

        llm = LLM(**qwen30b.options(folder, backend, **more))
    print(f"engine with backend {backend}: {time.perf_counter() - began:.0f} s", flush=True)
    return llm


def refit(link: Any, llm: Any, sleep: int) -> dict[str, float]:
    """One refit and its line."""
    if sleep:
        llm.sleep(level=sleep)
        llm.wake_up(tags=["weights"])
    began = time.perf_counter()
    report = link.refit()
    total = time.perf_counter() - began
    if sleep:
        llm.wake_up(tags=["kv_cache"])
    row = {**report.seconds, "pause": report.pause_s, "bytes": report.bytes_sent, "total": total}
    row["host"] = report.host_s
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


def copy_bandwidth(source: torch.device, destination: torch.device) -> float:
    """Bytes per second of a large copy, counted once (median of 10); a processor's memory is pinned."""
    there = torch.empty(1 << 30, dtype=torch.uint8, device=destination)
    pinned = source.type == "cpu"
    here = torch.empty(1 << 30, dtype=torch.uint8, device=source, pin_memory=pinned)
    gpus = [device for device in (destination, source) if device.type == "cuda"]
    seconds = []
    for _ in range(12):
        synchronize(gpus)
        began = time.perf_counter()
        there.copy_(here)
        synchronize(gpus)
        seconds.append(time.perf_counter() - began)
    return (1 << 30) / statistics.median(seconds[2:])


def synchronize(gpus: list[torch.device]) -> None:
    """Wait for all of them."""
    for gpu in gpus:
        torch.cuda.synchronize(gpu)


if __name__ == "__main__":
    main()
