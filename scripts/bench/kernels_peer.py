"""Quantize or copy straight into another GPU's memory, beside NCCL and the copy engine, in one run.

usage: torchrun --nproc-per-node 2 -m scripts.bench.kernels_peer [--out FILE.jsonl]

Two GPUs of one host. Rank 0 owns the weights, rank 1 the memory they go to. Rank 1 shares one large allocation by
cudaIpcGetMemHandle; rank 0 opens it with its own GPU current and writes its raw address into a
descriptor table. Bandwidth counts the FP8 bytes and scales that cross, once.

Pairs that are FP8 already could take the copy engine, which counts no NaN and digests nothing: both
ways are timed, as one pair and as the pairs of expert matrices, and what a digest besides would cost.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp8sync_kernels import Matrix, Part, Table, build_table, run_table
from fp8sync_kernels.job import cast, copy_codes, quantize

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


def pass_through(library: ctypes.CDLL, address: int, counters: torch.Tensor) -> dict[str, float]:
    """Bytes per second of FP8 pairs brought to `address`, by case."""
    found = {}
    for name, shape in (("one pair", (ROWS, COLS)), ("pairs of 768x2048", (768, 2048))):
        number = ROWS * COLS // (shape[0] * shape[1])
        grid = (shape[0] // 128, shape[1] // 128)
        codes = torch.randint(0, 0x7F, (number, *shape), dtype=torch.uint8, device="cuda")
        scales = torch.ones(number, *grid, device="cuda")
        jobs, copies, at = [], [], address
        for weight, scale_inv in zip(codes, scales, strict=True):
            scale_at = at + weight.nbytes
            jobs.append(copy_codes(weight, Matrix(at, *shape, shape[1], torch.uint8)))
            held = Matrix(scale_at, *grid, grid[1], torch.float32)
            jobs.append(cast(scale_inv, held, Part(base=weight.nbytes)))
            copies += [(at, weight), (scale_at, scale_inv)]
            at = scale_at + scale_inv.nbytes
        table = build_table(jobs, "cuda")
        looked_at = build_table([replace(job, destination=None) for job in jobs[::2]], "cuda")

        def by_kernel(table: Table = table) -> None:
            run_table(table, counters[0], counters[1])

        def by_engine(copies: list[tuple[int, torch.Tensor]] = copies) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for target, x in copies:
                ends = ctypes.c_void_p(target), ctypes.c_void_p(x.data_ptr())
                check(library.cudaMemcpyAsync(*ends, ctypes.c_size_t(x.nbytes), 4, stream))

        def digested(table: Table = looked_at, engine: Any = by_engine) -> None:
            run_table(table, counters[0], counters[1])
            engine()

        size = codes.nbytes + scales.nbytes
        for how, work in (
            ("by kernel, NaN counted, digested", by_kernel),
            ("by the copy engine, neither", by_engine),
            ("by the copy engine, after a kernel that counts and digests", digested),
        ):
            found[f"{name} {how}"] = size / seconds(work)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
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
    shared = torch.tensor(list(bytes(handle)), dtype=torch.uint8, device="cuda")
    dist.broadcast(shared, src=1)
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
        opened = Handle.from_buffer_copy(bytes(shared.tolist()))
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
        for case, rate in pass_through(library, address.value or 0, counters).items():
            percent = 100 * rate / nccl
            lines.append({"case": case, "gb_s": rate / 1e9, "percent_of_nccl": percent})
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
