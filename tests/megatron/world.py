"""Runs cases on a few trainer ranks: one process imports Megatron, then forks the ranks.

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
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from tests.megatron import cpu, models

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT = timedelta(seconds=60)


def run(folder: Path, ranks: int, cases: Sequence[str]) -> None:
    """Write the checkpoints, fork the ranks, wait for them."""
    cpu.import_bridge()
    from tests.megatron import checks  # noqa: F401  (imported once, before the fork)

    for kind in {case.split(":")[1] for case in cases}:
        models.write_checkpoint(kind, folder / kind)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(folder, rank, ranks, server.port, cases))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _rank(folder: Path, rank: int, ranks: int, port: int, cases: Sequence[str]) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, timeout=TIMEOUT)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store, timeout=TIMEOUT)
    results: dict[str, list[str]] = {}
    for case in cases:
        faults = [f"rank {rank}: {fault}" for fault in _faults(folder, case)]
        found: list[list[str]] = [[] for _ in range(ranks)]
        dist.all_gather_object(found, faults)
        results[case] = [fault for one in found for fault in one]
        if rank == 0:
            (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _faults(folder: Path, case: str) -> list[str]:
    from tests.megatron import checks

    check, kind, layout = case.split(":")
    axes = {
        axis: int(size) for axis, _, size in (a.partition("=") for a in layout.split(",")) if axis
    }
    try:
        return getattr(checks, check)(folder / kind, axes)
    # Whatever it is, it is this case's result; the other cases go on.
    except Exception:  # noqa: BLE001
        told = traceback.format_exc()
        print(told, file=sys.stderr)  # the other ranks may never hear of it
        return [told]


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
