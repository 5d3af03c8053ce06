"""A trainer of two ranks and two engines, run by torchrun: `fleet_ranks FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fp8sync
from tests import conftest as _environment  # noqa: F401  (sets it)
from tests.engines import world


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    result: dict[str, Any] = {}
    model, trained = (world.tiny_model("dense", seed) for seed in (1, 2))
    engines: Any = None
    if rank == 0:
        checkpoint = world.write_checkpoint(trained, folder / "fresh", "pow2")
        engines = [engine(checkpoint, f) for f in ("auto", "dummy")]
        fresh = world.logprobs(engines[0])
    dist.barrier()
    recipe = world.recipe("blockwise-pow2")
    with fp8sync.connect(model, engines, recipe, timeout_s=60.0) as link:
        routes = {(c.source_rank, c.destination_rank) for c in link.plan.plan.copies}
        result["routes"] = sorted(routes)
        result["version"] = link.refit().version
        if rank == 0:
            result["other"] = (world.logprobs(engines[0]) - fresh).abs().max().item()
        model.load_state_dict(trained.state_dict())
        result["sent"] = link.refit().bytes_sent
        found = [world.logprobs(llm) for llm in engines or ()]
        if rank == 1:
            with torch.no_grad():
                model.get_parameter("model.norm.weight")[7] = torch.nan
        try:
            link.refit()
        except fp8sync.NonFiniteWeight as error:
            result["error"] = str(error)
        result["kept"] = [
            (world.logprobs(llm) - before).abs().max().item()
            for llm, before in zip(engines or (), found, strict=True)
        ]
    dist.barrier()
    if rank == 0:
        result["difference"] = [(rows - fresh).abs().max().item() for rows in found]
        for llm in engines:
            world.stop_engine(llm)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()


def engine(folder: Path, load_format: str) -> Any:
    return world.start_engine(folder, multiprocess=True, load_format=load_format)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
