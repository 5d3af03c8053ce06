"""Over NCCL, replicas on another node than the trainer are fed once and hand on to one another; every byte compared.

All GPUs are of one host; the workers are told that they sit on a node of their own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.transport.seat import NODE_VARIABLE
from scripts.bench import refit_world
from tests.layouts.cases import QWEN

BUCKET_BYTES = 1 << 16
"""Small, so that there are many: what a message costs is part of the forecast."""
VERSIONS = 3


@pytest.mark.parametrize(
    "engines", [pytest.param(n, marks=pytest.mark.multigpu(n + 1)) for n in (2, 3)]
)
def test_replicas_are_fed_once(engines: int) -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    mp.spawn(member, (engines, store.port), engines + 1)


def member(rank: int, engines: int, port: int) -> None:
    """One trainer, or one of the engines; what it raises fails the test."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store: Any = dist.TCPStore("127.0.0.1", port, None, False)
    os.environ[NODE_VARIABLE] = "engines" if rank else "trainer"
    source, wanted = manifest(TrainerLayout(), QWEN), manifest(EngineLayout(engines=engines), QWEN)
    if rank:
        receive(rank - 1, wanted, device, store)
    else:
        send(source, engines, device, store)


def send(source: Any, engines: int, device: torch.device, store: Any) -> None:
    """Feed the node, and look at what was sent."""
    held = refit_world.allocated(source, 0, device)
    paper = refit_world.PaperSource(source, held)
    link = refit_world.lead(paper, store, "forward", "nccl", (1, engines), BUCKET_BYTES)
    assert link.transport == "nccl"
    assert "each node being fed once" in link.transport_reason
    copies = link.plan.copies
    wanted = sum(copy.weight_bytes + copy.scale_bytes for copy in copies)
    fed = sum(copy.weight_bytes + copy.scale_bytes for copy in copies if copy.via is None)
    assert fed * engines == wanted
    for version in range(1, VERSIONS + 1):
        refit_world.fill(source, 0, held, version)
        refit_world.timed_refit(link, version)
    link.close()


def receive(rank: int, wanted: Any, device: torch.device, store: Any) -> None:
    """Take every version anew into zeroed staging memory, the trainer's share and the others'."""
    expected = refit_world.allocated(wanted, rank, device)
    worker = refit_world.Worker(refit_world.own(wanted, rank), rank, device)
    worker.join(store, "forward")
    for version in range(1, VERSIONS + 1):
        refit_world.fill(wanted, rank, expected, version)
        worker.clear()
        worker.take()
        assert not refit_world.differing(worker.staged, expected)
    worker.leave()
