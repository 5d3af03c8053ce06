"""Two trainer ranks with a GPU each agree on cut blocks by NCCL and write; run by torchrun.

Each writes into a zeroed arena of its own; the arenas' sum is what one engine would hold.
"""

from __future__ import annotations

import os
import statistics
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from fp8sync.layouts import manifest
from fp8sync.plan import build_plan
from fp8sync.recipe import Formula
from fp8sync.sending.exchange import open_exchange
from fp8sync.sending.share import Share
from fp8sync.sending.writer import StagingPlace, Writer
from fp8sync.trainers import join_team
from fp8sync.transport.memory import allocate, export_memory
from fp8sync.transport.nccl import NcclGroup
from tests.layouts import wire
from tests.layouts.cases import E, T, dense

ALIGN = 256


def check(rank: int, device: torch.device, formula: Formula) -> str:
    model = dense(hidden=320, intermediate=640)
    source, destination = manifest(T(dp=2, fsdp=2), model), manifest(E(formula=formula), model)
    plan = build_plan(source, destination, exchange_amax=True)
    assert plan.amax
    tensors = wire.random_tensors(source)
    held = {n: t.to(device) for n, t in wire.storages(source, tensors)[rank].items()}
    join = partial(join_team, rank, device, formula.value, "127.0.0.1", 60.0)
    exchange = open_exchange(plan.amax, rank, device, join)
    assert isinstance(exchange._team, NcclGroup)
    wanted = wire.storages(destination, wire.quantized(destination, tensors))[0]
    offsets, used = {}, 0
    for name, tensor in wanted.items():
        offsets[name] = used
        used += -(-tensor.numel() * tensor.element_size() // ALIGN) * ALIGN
    arena = allocate(used, device).zero_()
    live: Any = SimpleNamespace(storages=lambda: held)
    share = Share(live, rank, source, plan, 60.0, exchange)
    writer = Writer(share, {0: StagingPlace(export_memory(arena), offsets)})
    sent = writer.send(1, lambda _: None)
    assert sent.error is None, sent.error
    dist.all_reduce(arena)
    for name, tensor in wanted.items():
        nbytes = tensor.numel() * tensor.element_size()
        found = arena[offsets[name] : offsets[name] + nbytes].cpu()
        assert torch.equal(found, wire.bits(tensor)), name
    seconds = []
    for _ in range(50):
        torch.cuda.synchronize()
        began = time.perf_counter()
        exchange.agree(lambda: held)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    exchange.close()
    values = exchange._joint.numel() - 1
    return f"{formula.value}: {values} values agreed in {1e6 * statistics.median(seconds):.0f} us"


def main() -> None:
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    told = [check(rank, device, formula) for formula in Formula]
    if rank == 0:
        print(*told, sep="\n", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
