"""Measure the kernels on one GPU: a line for each case, and JSONL.

usage: python -m scripts.bench.kernels [--out FILE.jsonl] [--layers N]

Bytes are counted from the tensors (read plus written). "% of copy" is against the bandwidth of
PyTorch's device-to-device copy of 6 GiB in the same run; each case also names the copy bandwidth
for as many bytes as it moves itself. Times are medians of 20 by CUDA events, after warm-up.

A pair of events around each launch also times how long a launch takes to begin. So large matrices
are timed a second time: 20 launches in a row between one pair of events, and copies likewise, over
so many buffers by turns that nothing is found in the L2 cache.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from fp8sync_kernels import Part, build_table, run_table
from fp8sync_kernels.job import canonical_digest, cast, copy, copy_codes
from scripts.bench import kernel_cases, kernel_peers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scripts.bench.kernel_cases import Case

RUNS = 20
SLOTS = 20_000
SPIN = 10_000_000
"""Cycles that the device spins while launches are queued, so that no pace of the host's is timed."""


def device_seconds(work: Callable[[], object], runs: int = RUNS) -> float:
    """Median time of `work` on the device."""
    for _ in range(3):
        work()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    torch.cuda._sleep(SPIN)
    for start, stop in pairs:
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs) * 1e-3


def free() -> None:
    """Give back what nobody holds any more: of all experts' weights, a GPU of 80 GB holds one copy.

    For some milliseconds afterwards, copies are slower by a tenth or two.
    """
    gc.collect()
    torch.cuda.empty_cache()
    time.sleep(1)


def seconds_in_a_row(works: Sequence[Callable[[], object]]) -> float:
    """Time of one of 20 calls on the device, taken by turns, between one pair of events; median of 5."""
    times = []
    for _ in range(5):
        torch.cuda._sleep(SPIN)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _, work in zip(range(RUNS), itertools.cycle(works)):
            work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3 / RUNS)
    return statistics.median(times)


def turns(moved_bytes: int) -> int:
    """Buffers to take by turns so that, together, they exceed the L2 cache four times."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return max(2, -(-4 * cache // moved_bytes))


def host_seconds(work: Callable[[], object]) -> float:
    """Median time that a call keeps the host, with nothing queued before it."""
    times = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def elapsed_seconds(work: Callable[[], object]) -> float:
    """Time from a call, with nothing queued before it, to the end of what it queues; median of 3."""
    times = []
    work()
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth(moved_bytes: int) -> float:
    """Bytes per second, read plus written, of a copy that moves so many."""
    source, target = torch.empty(2, moved_bytes // 2, dtype=torch.uint8, device="cuda")
    return 2 * source.numel() / device_seconds(lambda: target.copy_(source))


def copy_bandwidth_in_a_row(moved_bytes: int) -> float:
    """The same, of copies that follow one another."""
    pairs = torch.empty(turns(moved_bytes), 2, moved_bytes // 2, dtype=torch.uint8, device="cuda")
    works = [functools.partial(target.copy_, source) for source, target in pairs]
    return 2 * pairs.shape[2] / seconds_in_a_row(works)


class Report:
    """Prints the lines, and writes them to a file as they come."""

    def __init__(self, out: Path | None = None) -> None:
        self.out = out
        if out:
            out.write_text("")
        self.copy = copy_bandwidth(12 << 30)
        self.copy_in_a_row = copy_bandwidth_in_a_row(12 << 30)
        free()
        self.digests = torch.zeros(SLOTS, dtype=torch.int64, device="cuda")
        self.nonfinite = torch.zeros_like(self.digests)
        device = torch.cuda.get_device_name()
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        copies = {
            "copy_gb_s": self.copy / 1e9,
            "copy_in_a_row_gb_s": self.copy_in_a_row / 1e9,
        }
        self.add("device", device=device, **versions, date=date, **copies)

    def add(self, case: str, **values: Any) -> None:
        if self.out:
            with self.out.open("a") as file:
                file.write(json.dumps({"case": case, **values}) + "\n")
        shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        print(f"{case:44s} {' '.join(shown)}", flush=True)

    def time(self, case: str, work: Callable[[], object], moved_bytes: int, **more: Any) -> float:
        seconds = device_seconds(work)
        rate = moved_bytes / seconds
        percent = 100 * rate / self.copy
        self.add(case, us=seconds * 1e6, gb_s=rate / 1e9, percent_of_copy=percent, **more)
        return seconds

    def time_in_a_row(self, cases: Sequence[Case]) -> None:
        works = [functools.partial(self.launch, case) for case in cases]
        moved = cases[0].moved_bytes
        seconds = seconds_in_a_row(works)
        rate = moved / seconds
        self.add(
            "  launches in a row",
            us=seconds * 1e6,
            gb_s=rate / 1e9,
            percent_of_copy_in_a_row=100 * rate / self.copy_in_a_row,
            copy_of_this_size_in_a_row=copy_bandwidth_in_a_row(moved) / 1e9,
        )

    def launch(self, case: Case, digests: bool = True, nonfinite: bool = True) -> None:
        for table in case.tables:
            counters = (self.digests if digests else None, self.nonfinite if nonfinite else None)
            run_table(table, *counters)


def matrices(report: Report) -> None:
    for formula, dtype in (
        ("pow2", torch.bfloat16),
        ("fp32", torch.bfloat16),
        ("pow2", torch.float16),
        ("pow2", torch.float32),
    ):
        for rows, cols in ((32768, 4096), (65536, 8192)):
            case = kernel_cases.matrix_case(rows, cols, formula, dtype)
            same = copy_bandwidth(case.moved_bytes) / 1e9
            size = case.moved_bytes
            report.time(
                case.name, lambda case=case: report.launch(case), size, copy_of_this_size=same
            )
            others = [
                kernel_cases.matrix_case(rows, cols, formula, dtype) for _ in range(turns(size) - 1)
            ]
            report.time_in_a_row([case, *others])
            del others
            if formula == "pow2" and dtype == torch.bfloat16:
                for without in ("digests", "nonfinite", "both"):
                    flags = {
                        "digests": without == "nonfinite",
                        "nonfinite": without == "digests",
                    }
                    label = f"  without {without}"
                    report.time(
                        label, lambda case=case, flags=flags: report.launch(case, **flags), size
                    )
                host = host_seconds(lambda case=case: report.launch(case))
                report.add("  host time of a launch", us=host * 1e6)
            del case
            gc.collect()


def models(report: Report, layers: int) -> None:
    free()
    case = kernel_cases.llama_31_8b("pow2")
    launches = len(case.tables)
    work = functools.partial(report.launch, case)
    report.time(case.name, work, case.moved_bytes, launches=launches)
    del case, work
    free()
    for formula in ("pow2", "fp32"):
        case = kernel_cases.qwen3_30b_a3b_experts(formula, layers)
        launches = len(case.tables)
        grouped = report.time(
            case.name,
            functools.partial(report.launch, case),
            case.moved_bytes,
            launches=launches,
            tensors=case.tensors,
        )
        if formula == "pow2":
            alone = elapsed_seconds(functools.partial(report.launch, per_tensor(case)))
            report.add("  one launch per tensor", us=alone * 1e6, times_slower=alone / grouped)
        del case
        free()


def per_tensor(case: Case) -> Case:
    """The same work, one launch for each tensor."""
    return replace(case, tables=kernel_cases.per_tensor_tables(case))


def moves(report: Report) -> None:
    source = torch.randint(0, 0x7F, (65536, 16384), dtype=torch.uint8, device="cuda")
    halved = torch.randint(0, 0x70, (65536, 16384), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    wide = torch.empty(65536, 20480, dtype=torch.uint8, device="cuda")
    scales, kept = torch.ones(2, 512, 128, device="cuda")
    size = source.numel()
    pair = [copy_codes(source, target), cast(scales, kept, Part(base=size))]
    experts = source.view(-1)[: 682 * 768 * 2048].view(682, 768, 2048)
    strided = wide.view(-1, 2560)[: 682 * 768, :2048].split(768)
    scattered = [copy(x, live) for x, live in zip(experts, strided, strict=True)]
    for name, jobs, moved in (
        ("copy", [copy(source, target)], 2 * size),
        ("copy of an FP8 pair, NaN counted", pair, 2 * (size + scales.nbytes)),
        ("scatter into a strided tensor", [copy(source, wide[:, 1024:17408])], 2 * size),
        ("digest of live memory", [copy(source, None)], size),
        ("canonical digest of live memory", [canonical_digest(source, scales)], size),
        ("canonical digest, every block re-encoded", [canonical_digest(halved, scales)], size),
        ("scatter of 682 matrices of 768x2048", scattered, 2 * experts.numel()),
    ):
        table = build_table(jobs, "cuda")
        report.time(
            name, lambda table=table: run_table(table, report.digests, report.nonfinite), moved
        )


def peers(report: Report) -> list[tuple[str, str]]:
    """One matrix by each other implementation; returns those that run here."""
    from fp8sync_kernels import quantize_blockwise

    x = torch.randn(32768, 4096, device="cuda").mul_(0.02).bfloat16()
    moved = x.nbytes + x.numel() + x.numel() // 16384 * 4
    found, missing = kernel_peers.available(x)
    for name, why in missing.items():
        report.add(f"peer {name}", missing=why)
    for (name, formula), call in found.items():
        codes, scale_inv = (t.contiguous() for t in call())
        ours = quantize_blockwise(x, formula)
        other_bytes = int((codes.view(torch.uint8) != ours.weight.view(torch.uint8)).sum())
        other_scales = int((scale_inv != ours.scale_inv).sum())
        report.time(
            f"peer {name} {formula}",
            call,
            moved,
            bytes_that_differ=other_bytes,
            of_bytes=x.numel(),
            scales_that_differ=other_scales,
            of_scales=scale_inv.numel(),
            version=kernel_peers.version(name),
        )
    return list(found)


def experts_by_peers(report: Report, found: list[tuple[str, str]]) -> None:
    """The expert matrices of two layers: grouped, and in loops over them, by the host's clock."""
    shapes = kernel_cases.QWEN3_30B_A3B_EXPERTS * 2
    xs = [torch.randn(shape, device="cuda").mul_(0.02).bfloat16() for shape in shapes]
    grouped = {}
    for formula in ("pow2", "fp32"):
        case = kernel_cases.qwen3_30b_a3b_experts(formula, layers=2)
        grouped[formula] = elapsed_seconds(functools.partial(report.launch, case))
        report.add(f"{case.tensors} experts, one launch, {formula}", us=grouped[formula] * 1e6)
        alone = elapsed_seconds(functools.partial(report.launch, per_tensor(case)))
        slower = alone / grouped[formula]
        report.add("  one launch per tensor", us=alone * 1e6, times_slower=slower)
    for name, formula in found:

        def loop(name: str = name, pow2: bool = formula == "pow2") -> None:
            for x in xs:
                kernel_peers.PEERS[name](x, pow2)

        taken = elapsed_seconds(loop)
        slower = taken / grouped[formula]
        report.add(f"  {name} {formula}, by tensor", us=taken * 1e6, times_slower=slower)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=48, help="of the expert model")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report(arguments.out)
    matrices(report)
    moves(report)
    models(report, arguments.layers)
    found = peers(report)
    free()
    experts_by_peers(report, found)


if __name__ == "__main__":
    main()
