"""Between GPUs, by every transport: one process per rank, real staging memory, every byte compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fp8sync.layouts import manifest
from scripts.bench import refit_world
from tests.layouts.cases import PAIRS

if TYPE_CHECKING:
    from pathlib import Path

BUCKET_BYTES = 1 << 19
VERSIONS = 3
NAMES = ["1-1", "1-tp2", "tp2-1", "fsdp3-1", "fsdp2-tp2", "moe-ep2-ep2", "pairs-moe-ep2-tp2"]


def ranks(name: str) -> int:
    return PAIRS[name].trainer.ranks + PAIRS[name].engine.ranks


@pytest.mark.parametrize("transport", ["ipc", "nccl", "golden"])
@pytest.mark.parametrize("gpus", [pytest.param(n, marks=pytest.mark.multigpu(n)) for n in (2, 4)])
def test_every_byte(gpus: int, transport: str, tmp_path: Path) -> None:
    """All layouts that need more than half as many GPUs, one after the other in the same processes."""
    names = [name for name in NAMES if gpus / 2 < ranks(name) <= gpus]
    assert names
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    mp.spawn(member, (names, transport, store.port, str(tmp_path)), gpus)


def member(rank: int, names: list[str], transport: str, port: int, folder: str) -> None:
    """One rank of either side; what it raises fails the test."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store: Any = dist.TCPStore("127.0.0.1", port, None, False)
    gpus = max(2, *map(ranks, names))
    meeting = dist.FileStore(f"{folder}/group", gpus)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=gpus)
    for name in names:
        if rank < ranks(name):
            take_part(rank, name, transport, device, store)
        dist.barrier()
    dist.destroy_process_group()


def take_part(rank: int, name: str, transport: str, device: torch.device, store: Any) -> None:
    """One layout."""
    case = PAIRS[name]
    source, wanted = manifest(case.trainer, case.model), manifest(case.engine, case.model)
    counts = case.trainer.ranks, case.engine.ranks
    if rank >= case.trainer.ranks:
        receive(rank, case.trainer.ranks, name, wanted, device, store)
    else:
        held = refit_world.allocated(source, rank, device)
        paper = refit_world.PaperSource(refit_world.own(source, rank), held)
        if rank == 0:
            link = refit_world.lead(paper, store, name, transport, counts, BUCKET_BYTES)
            assert link.transport == transport
            for version in range(1, VERSIONS + 1):
                refit_world.fill(source, rank, held, version)
                refit_world.await_ready(store, name, version, range(1, sum(counts)))
                refit_world.timed_refit(link, version)
            link.close()
        else:
            follower = refit_world.follow(paper, rank, store, name)
            for version in range(1, VERSIONS + 1):
                refit_world.fill(source, rank, held, version)
                refit_world.ready(store, name, version, rank)
                follower.transfer()
            follower.close()


def receive(
    member: int, trainers: int, name: str, wanted: Any, device: torch.device, store: Any
) -> None:
    """Take every version, all weights new, into zeroed staging memory."""
    rank = member - trainers
    expected = refit_world.allocated(wanted, rank, device)
    worker = refit_world.Worker(refit_world.own(wanted, rank), rank, device)
    worker.join(store, name)
    for version in range(1, VERSIONS + 1):
        refit_world.fill(wanted, rank, expected, version)
        worker.clear()
        refit_world.ready(store, name, version, member)
        worker.take()
        assert not refit_world.differing(worker.staged, expected), name
    worker.leave()
