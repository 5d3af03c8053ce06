"""Quantize straight into another GPU's memory, beside NCCL, in one run on two GPUs of one host.

usage: torchrun --nproc-per-node 2 -m scripts.bench.kernels_peer [--out FILE.jsonl]

Rank 0 owns the weights, rank 1 the memory they go to. Rank 1 shares one large allocation by
cudaIpcGetMemHandle; rank 0 opens it with its own GPU current and writes its raw address into a
descriptor table. Bandwidth counts the FP8 bytes and scales that cross, once.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp8sync_kernels import Matrix, Part, build_table, quantize_blockwise, run_table
from fp8sync_kernels.job import quantize

ROWS, COLS = 65536, 16384
RUNS = 20


class Handle(ctypes.Structure):
    """cudaIpcMemHandle_t: 64 bytes, passed by value."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


def runtime() -> ctypes.CDLL:
    """The CUDA runtime that PyTorch has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libcudart" in line:
            return ctypes.CDLL(line.split()[-1])
    raise RuntimeError("no CUDA runtime is loaded")


def check(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code}")


def seconds(work: Any) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(RUNS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rank = int(__import__("os").environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    code_bytes, grid = ROWS * COLS, (ROWS // 128, COLS // 128)
    size = code_bytes + grid[0] * grid[1] * 4
    buffer = torch.zeros(size, dtype=torch.uint8, device="cuda")
    lines = []

    def wire() -> None:
        if rank == 0:
            dist.send(buffer, 1)
        else:
            dist.recv(buffer, 0)

    nccl = size / seconds(wire)
    dist.barrier()
    library = runtime()
    handle = Handle()
    if rank == 1:
        # A segment of its own: the handle is of the allocation's beginning.
        buffer = torch.cuda.caching_allocator_alloc(size + (32 << 20))
        check(library.cudaIpcGetMemHandle(ctypes.byref(handle), ctypes.c_void_p(buffer)))
    shared = [bytes(handle) if rank == 1 else None]
    dist.broadcast_object_list(shared, src=1)
    if rank == 0:
        lines.append(
            {
                "case": "device",
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "nccl": ".".join(map(str, torch.cuda.nccl.version())),
                "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
                "bytes": size,
            }
        )
        lines.append({"case": "nccl send/recv", "gb_s": nccl / 1e9})
        address = ctypes.c_void_p()
        opened = Handle.from_buffer_copy(shared[0])
        check(library.cudaIpcOpenMemHandle(ctypes.byref(address), opened, 1))
        x = torch.empty(ROWS, COLS, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        weight = Matrix(address.value, ROWS, COLS, COLS, torch.uint8)
        scale_inv = Matrix(address.value + code_bytes, *grid, grid[1], torch.float32)
        counters = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
        for formula in ("pow2", "fp32"):
            table = build_table([quantize(x, formula, weight, scale_inv, Part())], "cuda")
            for programs in (None, 132, 264, 528):

                def write(table: Any = table, programs: int | None = programs) -> None:
                    run_table(table, counters[0], counters[1], programs=programs)

                rate = size / seconds(write)
                lines.append(
                    {
                        "case": f"quantize {formula} into the other GPU, programs={programs}",
                        "gb_s": rate / 1e9,
                        "percent_of_nccl": 100 * rate / nccl,
                    }
                )
        counters.zero_()
        write()
        torch.cuda.synchronize()
    dist.barrier()
    if rank == 1:
        from fp8sync_kernels import digest
        from fp8sync_kernels.memory import bytes_at

        landed = bytes_at(buffer, size, torch.device("cuda", 1))
        received = torch.tensor([_signed(digest(landed))], device="cuda")
        dist.send(received, 0)
    else:
        received = torch.empty(1, dtype=torch.int64, device="cuda")
        dist.recv(received, 1)
        local = quantize_blockwise(x[:4096], "fp32")
        assert local.nonfinite == 0
        lines.append({"case": "digest of the landed bytes", "equal": bool(received == counters[0])})
        for line in lines:
            print(json.dumps(line), flush=True)
        if arguments.out:
            arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dist.barrier()
    dist.destroy_process_group()


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


if __name__ == "__main__":
    main()
