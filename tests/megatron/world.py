"""Runs cases on a few trainer ranks: one process imports Megatron, and forks the ranks of each case.

    python -m tests.megatron.world FOLDER RANKS CASE...

A case is `check:model:axis=size,...`. Writes FOLDER/results.json: for each case that ran, its faults.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from tests.megatron import cpu, models

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT = timedelta(seconds=60)
LIMIT_S = 120


def run(folder: Path, ranks: int, cases: Sequence[str]) -> None:
    """Write the checkpoints, run the cases one after the other."""
    tqdm.monitor_interval = 0  # a thread that forks may deadlock with
    cpu.import_bridge()
    from tests.megatron import distributed, grouped, kv, loose, overlap, refusals  # noqa: F401  (imported once, before the fork)

    for kind in {case.split(":")[1] for case in cases}:
        models.write_checkpoint(kind, folder / kind)
    results = {}
    for case in cases:
        results[case] = _run_case(folder, ranks, case)
        (folder / "results.json").write_text(json.dumps(results))


def _run_case(folder: Path, ranks: int, case: str) -> list[str]:
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    port = 0
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(folder, rank, ranks, port, case, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
        # Rank 0 serves the rendezvous: a server here would be a thread that forks may deadlock with.
        port = port or _receive(ours, 0)
    found = []
    for rank, pipe in enumerate(pipes):
        faults = _receive(pipe, ["died, or did not answer"])
        found += [f"rank {rank}: {fault}" for fault in faults]
    for process in processes:
        process.join(5)
        process.kill()
    return found


def _receive(pipe: Any, otherwise: Any) -> Any:
    try:
        return pipe.recv() if pipe.poll(LIMIT_S) else otherwise
    except EOFError:
        return otherwise


def _rank(folder: Path, rank: int, ranks: int, port: int, case: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    first = {"is_master": rank == 0, "wait_for_workers": False, "timeout": TIMEOUT}
    store = dist.TCPStore("127.0.0.1", port, **first)
    if rank == 0:
        pipe.send(store.port)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store, timeout=TIMEOUT)
    faults = _faults(folder, case)
    if not faults:
        dist.barrier()  # the server leaves last
    pipe.send(faults)
    pipe.close()


def _faults(folder: Path, case: str) -> list[str]:
    from tests.megatron import checks, distributed, grouped, kv, loose, overlap, refusals

    check, kind, layout = case.split(":")
    pairs = (axis.partition("=") for axis in layout.split(",") if axis)
    axes = {axis: int(size) for axis, _, size in pairs}
    act = next(
        vars(m)[check]
        for m in (checks, distributed, grouped, kv, loose, overlap, refusals)
        if check in vars(m)
    )
    try:
        return act(folder / kind, axes)
    # Whatever it is, it is this case's result; the other cases go on.
    except Exception:  # noqa: BLE001
        return [traceback.format_exc()]


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
