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

from tests.megatron import cpu, models

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT = timedelta(seconds=60)


def run(folder: Path, ranks: int, cases: Sequence[str]) -> None:
    """Write the checkpoints, run the cases one after the other."""
    cpu.import_bridge()
    from tests.megatron import refusals  # noqa: F401  (imported once, before the fork)

    for kind in {case.split(":")[1] for case in cases}:
        models.write_checkpoint(kind, folder / kind)
    results = {}
    for case in cases:
        results[case] = _run_case(folder, ranks, case)
        (folder / "results.json").write_text(json.dumps(results))


def _run_case(folder: Path, ranks: int, case: str) -> list[str]:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=_rank, args=(folder, rank, ranks, server.port, case, pipe[1]))
        for rank, pipe in enumerate(pipes)
    ]
    for process, pipe in zip(processes, pipes, strict=True):
        process.start()
        pipe[1].close()
    found = []
    for rank, (pipe, _) in enumerate(pipes):
        try:
            faults = pipe.recv()
        except EOFError:
            faults = ["died"]
        found += [f"rank {rank}: {fault}" for fault in faults]
    for process in processes:
        process.join()
    return found


def _rank(folder: Path, rank: int, ranks: int, port: int, case: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, timeout=TIMEOUT)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store, timeout=TIMEOUT)
    pipe.send(_faults(folder, case))
    pipe.close()


def _faults(folder: Path, case: str) -> list[str]:
    from tests.megatron import checks, refusals

    check, kind, layout = case.split(":")
    pairs = (axis.partition("=") for axis in layout.split(",") if axis)
    axes = {axis: int(size) for axis, _, size in pairs}
    act = getattr(checks, check, None) or getattr(refusals, check)
    try:
        return act(folder / kind, axes)
    # Whatever it is, it is this case's result; the other cases go on.
    except Exception:  # noqa: BLE001
        return [traceback.format_exc()]


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
