"""An FSDP2 trainer of three ranks, run by torchrun: `three_ranks FOLDER`.

Rows are cut at thirds, so most 128x128 blocks at the cuts lie on two ranks, and the last shard is short.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fp8sync
from fp8sync.sources import as_source
from tests import conftest as _environment  # noqa: F401  (sets it)
from tests.engines import world

TIMEOUT_S = 60.0
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


class Failing:
    """A rank's weights that cannot be read for a while."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._source = as_source(model)
        self.broken = False
        self.prepared = 0

    def prepare(self) -> None:
        """A collective, as a late all-gather would be."""
        dist.barrier()
        self.prepared += 1

    def manifest(self) -> Any:
        return self._source.manifest()

    def storages(self) -> Any:
        if self.broken:
            raise RuntimeError("the parameters are offloaded")
        return self._source.storages()


def main(folder: Path) -> None:
    own_gpus = torch.cuda.device_count() >= 4  # the engine's is GPU 0
    if own_gpus:
        torch.cuda.set_device(1 + int(os.environ["RANK"]))
    dist.init_process_group("nccl" if own_gpus else "gloo")
    rank = dist.get_rank()
    result: dict[str, Any] = {}
    whole = world.tiny_model("dense", 1)
    model = sharded(world.tiny_model("dense", 1))
    grow(whole)
    llm = None
    if rank == 0:
        checkpoint = world.write_checkpoint(whole, folder / "fresh", "pow2")
        llm = world.start_engine(checkpoint, multiprocess=True)
        fresh = world.logprobs(llm)
    dist.barrier()
    source = Failing(model)
    link = fp8sync.connect(source, llm, world.recipe("blockwise-pow2"), timeout_s=TIMEOUT_S)
    result["transport"] = getattr(link, "transport", "")
    result["teams"] = [list(group.ranks) for group in link.plan.plan.amax]
    link.refit()
    result["other"] = (world.logprobs(llm) - fresh).abs().max().item() if llm else None
    dist.barrier()
    grow(model)  # a step, seen by the next refit
    result["version"] = link.refit().version
    if llm:
        before = world.logprobs(llm)
        result["difference"] = (before - fresh).abs().max().item()
    dist.barrier()
    result["audits"] = audits(link, model.get_parameter(WEIGHT).to_local(), rank)

    source.broken = rank == 1
    began = time.monotonic()
    result["unread"] = error_of(link.refit)
    result["unread_s"] = time.monotonic() - began
    source.broken = False

    shard = model.get_parameter(WEIGHT).to_local()
    kept = shard.detach().clone()
    if rank == 2:
        with torch.no_grad():
            shard[0, 5] = torch.nan  # in a block that rank 1 has a part of, too
    result["nonfinite"] = error_of(link.refit)
    with torch.no_grad():
        shard.copy_(kept)
    if llm:
        result["kept"] = (world.logprobs(llm) - before).abs().max().item()
    dist.barrier()
    result["last"] = link.refit().version
    result["prepared"] = source.prepared
    if llm:
        result["again"] = (world.logprobs(llm) - before).abs().max().item()
    source.broken = rank == 1
    result["unaudited"] = error_of(link.audit)
    link.close()
    if llm:
        world.stop_engine(llm)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()


@torch.no_grad()
def grow(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.25)


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (3,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@torch.no_grad()
def audits(link: Any, shard: torch.Tensor, rank: int) -> list[Any]:
    """Of the refitted engine, and once an element of rank 2, in a block that rank 1 shares, has changed."""
    before = link.audit()
    kept = shard[0, 5].clone()
    if rank == 2:
        shard[0, 5] = -kept
    after = link.audit()
    if rank == 2:
        shard[0, 5] = kept
    return [before.to_json(), after.to_json()]


def error_of(act: Any) -> str:
    try:
        act()
    except fp8sync.Fp8SyncError as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
