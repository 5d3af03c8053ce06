"""One of the ranks of an FSDP2 trainer that exports its model.

    python -m tests.export.fsdp_ranks RANK RANKS FOLDER

FOLDER/saved has the checkpoint. Writes FOLDER/RECIPE, and FOLDER/RANK.txt: what a NaN on one rank led to.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from fp8sync.errors import Fp8SyncError
from fp8sync.export import export_checkpoint

RECIPES = ("bf16", "blockwise-pow2", "blockwise-fp32")


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store, timeout=limit)
    model = AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for recipe in RECIPES:
        export_checkpoint(model, folder / recipe, recipe, band_bytes=100_000, progress=False)
    if rank == ranks - 1:
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.to_local()[3, 5] = torch.inf
    try:
        export_checkpoint(model, folder / "bad", progress=False)
    except Fp8SyncError as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
