"""Refit at full size between GPUs of one host, shard to shard, against the wire's own limit.

    NCCL_NVLS_ENABLE=0 python scripts/bench/refit.py [--cases NAME ...] [--repeats 7] [--share] [--out FILE.jsonl]

One process per member: the first are the trainer's ranks (BF16), the next the engine's workers (blockwise
FP8 in staging memory, without a model). A refit is timed on trainer rank 0 from the announcement of the
version until every worker has voted that all its bytes are staged and verified, in memory that was cleared
before. The floor is the largest number of bytes on any GPU's link over the bandwidth of 1 GiB send/recv in the
same run. After timing, every byte is compared with the reference quantization of the whole tensor.

Each member has a GPU of its own. With `--share`, those of a mapping with more members than GPUs share them,
crosswise (`refit_traffic.placed`). Processes on one GPU take turns at it: what ranks write and what workers
verify there is not at the same time. Bytes that stay on their GPU take time, too, but are not in the floor.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import refit_peers
import refit_world
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from refit_cases import CASES
from refit_traffic import traffic

from fp8sync.layouts import manifest
from fp8sync.layouts.presets import PRESETS
from fp8sync.plan import DEFAULT_BUCKET_BYTES, build_plan
from fp8sync.sending.outgoing import not_linked
from fp8sync.transport.seat import Seat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8sync.plan import Plan

GIB = 1 << 30
TABLES = 32 << 20
"""Room for descriptor tables and counters when peak memory is asserted. By `nccl` there are two buckets, by `ipc` none."""


def main() -> None:
    """Run the benchmark on all GPUs of this host."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--transports", nargs="*", default=["ipc", "nccl"])
    parser.add_argument("--peers", nargs="*", default=list(refit_peers.PEERS))
    parser.add_argument(
        "--peer-cases", nargs="*", default=["1 -> 1", "TP2 -> TP2.EP2", "FSDP2 -> TP2"]
    )
    parser.add_argument(
        "--share", action="store_true", help="let members share GPUs, where there are too few"
    )
    parser.add_argument(
        "--peer-limit",
        type=float,
        default=120.0,
        help="seconds until a peer is given up, and the run",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bucket-bytes", type=int, nargs="*", default=[DEFAULT_BUCKET_BYTES])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    print(
        f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL "
        f"{torch.cuda.nccl.version()}, {platform.platform()}, NVLS off: "
        f"{os.environ.get('NCCL_NVLS_ENABLE') == '0'}",
        flush=True,
    )
    size = gpus
    if options.share:
        size = max(max(CASES[name].processes(gpus)) + 1 for name in options.cases)
    mp.spawn(run_process, (gpus, max(size, gpus), store.port, options), max(size, gpus))


def run_process(process: int, gpus: int, size: int, port: int, options: argparse.Namespace) -> None:
    """Everything that one of `size` processes does; it has GPU `process` modulo `gpus`."""
    device = torch.device("cuda", process % gpus)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, None, False)
    # NCCL takes no two ranks on one GPU, so only groups of processes with their own are NCCL's.
    dist.init_process_group("gloo", store=store, rank=process, world_size=size)
    wire = bandwidth(process, device)
    if process == 0:
        print(f"send/recv of 1 GiB, GPU 0 -> GPU 1: {wire / 1e9:.1f} GB/s", flush=True)
        print(HEADING, flush=True)
    for name in options.cases:
        case = CASES[name]
        if case.ranks > gpus and not options.share:
            if process == 0:
                print(f"{name:26s} needs {case.ranks} GPUs", flush=True)
            continue
        members = case.processes(gpus)
        rank = members.index(process) if process in members else case.ranks
        Run(rank, device, gpus, store, name, wire, options).all()
    dist.barrier()
    dist.destroy_process_group()


def bandwidth(process: int, device: torch.device) -> float:
    """Bytes per second of 1 GiB messages from GPU 0 to GPU 1 (10 after 3)."""
    pair = dist.new_group([0, 1], backend="nccl")
    seconds = torch.zeros(1, dtype=torch.float64)
    if process < 2:
        message = torch.empty(GIB, dtype=torch.uint8, device=device)
        for count in (3, 10):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            for _ in range(count):
                if process == 0:
                    dist.send(message, 1, group=pair)
                else:
                    dist.recv(message, 0, group=pair)
            torch.cuda.synchronize(device)
            seconds[0] = (time.perf_counter() - began) / count
    dist.broadcast(seconds, 0)
    return GIB / seconds.item()


HEADING = (
    f"{'mapping':26s} {'way':18s} {'median s':>9s} {'floor s':>8s} {'ratio':>6s} "
    f"{'kept GB/s':>10s} {'crossed GB':>11s} {'stayed GB':>10s} {'host ms':>8s} "
    f"{'sender MiB':>11s} {'receiver MiB':>13s} {'equal':>6s}"
)


class Run:
    """One mapping, by every way, on one member; who has a higher rank than there are only looks on."""

    def __init__(
        self,
        rank: int,
        device: torch.device,
        gpus: int,
        store: Any,
        name: str,
        wire: float,
        options: argparse.Namespace,
    ) -> None:
        case = CASES[name]
        self._rank, self._device, self._store, self._options = rank, device, store, options
        self._name, self._case, self._wire = name, case, wire
        lying = case.lying(gpus)
        self._trainers, self._workers = lying[: case.trainer.ranks], lying[case.trainer.ranks :]
        seats = [Seat("", f"GPU {gpu}", "") for gpu in self._trainers]
        self._no_nccl = not_linked(
            seats, {w: {"gpu": f"GPU {gpu}"} for w, gpu in enumerate(self._workers)}
        )
        model = PRESETS[case.model]
        self._source = manifest(case.trainer, model)
        self._wanted = manifest(case.engine, model)
        self._trains = rank < case.trainer.ranks
        self._engine_rank = rank - case.trainer.ranks
        self._serves = 0 <= self._engine_rank < case.engine.ranks

    def all(self) -> None:
        """Run everything."""
        held: refit_world.Tensors = {}
        expected: refit_world.Tensors = {}
        worker: refit_world.Worker | None = None
        if self._trains:
            held = refit_world.allocated(self._source, self._rank, self._device)
            refit_world.fill(self._source, self._rank, held)
        if self._serves:
            expected = refit_world.allocated(self._wanted, self._engine_rank, self._device)
            refit_world.fill(self._wanted, self._engine_rank, expected)
            wanted = refit_world.own(self._wanted, self._engine_rank)
            worker = refit_world.Worker(wanted, self._engine_rank, self._device)
        torch.cuda.synchronize(self._device)
        for way in self._options.transports:
            if way == "nccl" and self._no_nccl:
                self._impossible(way, self._no_nccl)
                continue
            sizes = self._options.bucket_bytes
            for size in sizes if way == "nccl" else sizes[:1]:
                self._refit(way, size, held, worker, expected)
        for peer in self._options.peers:
            if self._name not in self._options.peer_cases:
                continue
            if refit_peers.PEERS[peer].only not in self._case.kinds:
                continue
            if self._no_nccl:
                self._impossible(peer, self._no_nccl)
            else:
                self._peer(peer, held, worker, expected)
        del held, expected, worker
        gc.collect()
        torch.cuda.empty_cache()

    def _impossible(self, way: str, why: str) -> None:
        """Say in a row of its own why there is no figure."""
        if self._rank == 0:
            print(f"{self._name:26s} {way:18s} not possible: {why}", flush=True)
            row = {"mapping": self._name, "way": way, "not_possible": why}
            self._write({**row, "command": " ".join(sys.argv)})

    def _give_up(self, peer: str, why: str) -> None:
        """End the whole run, of which a call of a peer's may never come back."""
        self._impossible(peer, why)
        time.sleep(
            5 * (self._rank > 0)
        )  # the first to end takes the others with it: rank 0, with its row
        os._exit(1)

    def _refit(
        self,
        way: str,
        size: int,
        held: refit_world.Tensors,
        worker: refit_world.Worker | None,
        expected: refit_world.Tensors,
    ) -> None:
        counts = self._case.trainer.ranks, self._case.engine.ranks
        key = f"{self._name}/{way}/{size}"
        repeats = self._options.repeats + 2
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        seconds: list[float] = []
        stages: list[dict[str, float]] = []
        plan: Plan | None = None
        source = None
        if self._trains:
            own = refit_world.own(self._source, self._rank)
            source = refit_world.PaperSource(own, held)
        if source and self._rank == 0:
            link = refit_world.lead(source, self._store, key, way, counts, size)
            for version in range(1, repeats + 1):
                refit_world.await_ready(self._store, key, version, range(counts[0], sum(counts)))
                seconds.append(refit_world.timed_refit(link, version, stages))
            plan = link.plan
            link.close()
        elif source:
            follower = refit_world.follow(source, self._rank, self._store, key)
            for _ in range(repeats):
                follower.transfer()
            follower.close()
        elif worker:
            worker.join(self._store, key)
            for version in range(1, repeats + 1):
                worker.clear()
                refit_world.ready(self._store, key, version, self._rank)
                worker.take()
            worker.leave()
        extra = torch.cuda.max_memory_allocated(self._device) - before
        assert extra <= 2 * size * (way == "nccl") + TABLES, (
            f"rank {self._rank} took {extra} bytes by {way}"
        )
        name = way if size == DEFAULT_BUCKET_BYTES else f"{way}, {size >> 20} MiB"
        self._row(name, seconds[2:], plan, extra, worker, expected, stages[2:])

    def _peer(
        self,
        peer: str,
        held: refit_world.Tensors,
        worker: refit_world.Worker | None,
        expected: refit_world.Tensors,
    ) -> None:
        """Time a peer; its floor is ours, for the shards that are kept."""
        trainers = self._case.trainer.ranks
        groups = (
            dist.new_group([0, *range(trainers, self._case.ranks)], backend="nccl"),
            dist.new_group(list(range(trainers)), backend="nccl"),
        )
        sides = self._source, self._wanted
        staged = worker.staged if worker else {}
        stage = refit_peers.Stage(self._rank, trainers, sides, held, staged, self._device, groups)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        limit_s = self._options.peer_limit
        late = threading.Timer(limit_s, self._give_up, (peer, f"not done within {limit_s:g} s"))
        late.daemon = True
        late.start()
        # A package that is not there, say: on all ranks alike, or others wait until the limit.
        try:
            made = refit_peers.PEERS[peer](stage)
            seconds = refit_peers.timed(made, 3)
        except Exception as error:  # noqa: BLE001  (another project's)
            self._impossible(peer, f"{type(error).__name__}: {error}")
            return
        finally:
            late.cancel()
        extra = torch.cuda.max_memory_allocated(self._device) - before
        plan = build_plan(*sides, exchange_amax=True) if self._rank == 0 else None
        self._row(made.name, seconds[1:], plan, extra, worker, expected)

    def _row(
        self,
        way: str,
        seconds: list[float],
        plan: Plan | None,
        extra: int,
        worker: refit_world.Worker | None,
        expected: refit_world.Tensors,
        stages: Sequence[dict[str, float]] = (),
    ) -> None:
        wrong = 0
        if worker:
            wrong = refit_world.differing(worker.staged, expected)
            worker.clear()
        said = torch.tensor([wrong, extra if self._trains else 0, extra if self._serves else 0])
        dist.all_reduce(said, dist.ReduceOp.MAX)
        wrong, sender, receiver = said.tolist()
        assert not wrong, f"{wrong} storages differ after {self._name} by {way}"
        if plan is None:
            return
        median = statistics.median(seconds)
        moved = traffic(plan, self._trainers, self._workers)
        floor = moved.most / self._wire
        kept = max(moved.into.values()) / median
        parts = stages[0] if stages else {}
        row = {
            "mapping": self._name,
            "model": self._case.model,
            "way": way,
            "gpus": {"trainer": self._trainers, "engine": self._workers},
            "seconds": seconds,
            "median_s": median,
            "stages_s": {key: statistics.median(s[key] for s in stages) for key in parts},
            "floor_s": floor,
            "ratio": median / floor,
            "kept_bytes_per_s": kept,
            "link_bytes": moved.most,
            "crossed_bytes": moved.crossed,
            "stayed_bytes": moved.stayed,
            "wire_bytes_per_s": self._wire,
            "sender_extra_bytes": sender,
            "receiver_extra_bytes": receiver,
            "equal": True,
        }
        host = f"{row['stages_s']['host'] * 1e3:.2f}" if stages else ""
        print(
            f"{self._name:26s} {way:18s} {median:9.4f} {floor:8.4f} {median / floor:6.2f} "
            f"{kept / 1e9:10.1f} {moved.crossed / 1e9:11.2f} {moved.stayed / 1e9:10.2f} {host:>8s} "
            f"{sender / 2**20:11.0f} {receiver / 2**20:13.0f} {'yes':>6s}",
            flush=True,
        )
        self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        if self._options.out:
            with self._options.out.open("a") as out_file:
                out_file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
