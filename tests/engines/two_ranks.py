"""A trainer of two ranks, run by torchrun: `two_ranks FOLDER TENSOR_PARALLEL`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fp8sync
from tests import conftest as _environment  # noqa: F401  (sets it)
from tests.engines import world


def main(folder: Path, tensor_parallel: int) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    result: dict[str, Any] = {}
    # Halved between two workers, 512 rows are still whole blocks.
    models = [world.tiny_model("dense", seed, intermediate_size=512) for seed in (1, 2)]
    llm = None
    if rank == 0:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(n) for n in range(tensor_parallel))
        checkpoint = world.write_checkpoint(models[-1], folder / "fresh", "pow2")
        options = {"multiprocess": True, "tensor_parallel_size": tensor_parallel}
        llm = world.start_engine(checkpoint, **options)
        fresh = world.logprobs(llm)
    dist.barrier()
    # Two links take turns on one engine: each finds that the other has been there, and joins anew.
    for model in (*models, *models):
        report = fp8sync.refit(model, llm, world.recipe("blockwise-pow2"))
    result["version"] = report.version
    fp8sync.refit(models[0], llm, world.recipe("blockwise-pow2"))
    result["other"] = (world.logprobs(llm) - fresh).abs().max().item() if llm else None
    recipe = world.recipe("blockwise-pow2")
    with fp8sync.connect(models[1], llm, recipe, commit="in-place", bucket_bytes=1 << 18) as link:
        report = link.refit()
        copies = [c for c in link.plan.plan.copies if rank in (0, c.source_rank)]
    result["planned"] = sum(c.weight_bytes + c.scale_bytes for c in copies)
    result["reported"] = sum(t.bytes for t in report.tensors)
    if rank == 0:
        result["difference"] = (world.logprobs(llm) - fresh).abs().max().item()
    dist.barrier()
    result["sent"] = {"bytes": report.bytes_sent}
    if rank == 1:
        with torch.no_grad():
            for parameter in models[1].parameters():
                parameter.fill_(float("nan"))
    before = world.logprobs(llm) if llm else None
    try:
        fp8sync.refit(models[1], llm, world.recipe("blockwise-pow2"))
    except fp8sync.NonFiniteWeight as error:
        result["error"] = str(error)
    try:
        fp8sync.refit(models[0], object(), world.recipe("blockwise-pow2"))
    except fp8sync.UnsupportedLayout as error:  # rank 0's, before it could open a link
        result["refused"] = str(error)
    if llm:
        result["kept"] = (world.logprobs(llm) - before).abs().max().item()
        world.stop_engine(llm)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
