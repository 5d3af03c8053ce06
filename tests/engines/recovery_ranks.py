"""A trainer of two ranks whose worker fails and recovers, run by torchrun: `recovery_ranks FOLDER`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fp8sync
from tests import conftest as _environment  # noqa: F401  (sets it)
from tests.engines import world
from tests.engines.sabotage import SABOTAGE

TIMEOUT_S = 16.0
STEPS: list[tuple[str, tuple[str, ...]]] = [
    ("fail_to_unpack", ("fp8sync.engines.vllm.buckets", "unpack")),
    ("fail_to_receive", ()),
]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = world.tiny_model("dense", 1)
    llm: Any = None
    if rank == 0:
        config = world.write_config(model, folder / "engine")
        options = {"load_format": "dummy", "multiprocess": True, **SABOTAGE}
        llm = world.start_engine(config, **options)
    dist.barrier()
    about: Any = {"timeout_s": TIMEOUT_S, "bucket_bytes": 1 << 18, "transport": "gloo"}
    link = fp8sync.connect(model, llm, world.recipe("blockwise-pow2"), **about)
    link.refit()
    failed = [failing(model, link, llm, *step) for step in STEPS]
    result: dict[str, Any] = {"failed": failed, "timeout_s": TIMEOUT_S}
    found = world.logprobs(llm) if llm else None
    link.close()
    if llm:
        world.stop_engine(llm)
        checkpoint = world.write_checkpoint(model, folder / "fresh", "pow2")
        fresh = world.start_engine(checkpoint, multiprocess=True)
        result["difference"] = (world.logprobs(fresh) - found).abs().max().item()
        world.stop_engine(fresh)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()


def failing(
    model: torch.nn.Module, link: Any, llm: Any, step: str, arguments: tuple[str, ...]
) -> dict[str, Any]:
    """Refit with a worker that fails, then once more; what this rank sees of it."""
    found: dict[str, Any] = {}
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    before = world.logprobs(llm) if llm else None
    if llm:
        llm.collective_rpc(step, args=arguments)
    dist.barrier()
    began = time.monotonic()
    try:
        link.refit()
    except fp8sync.Fp8SyncError as error:
        found |= {"kind": type(error).__name__, "error": str(error)}
    found["seconds"] = time.monotonic() - began
    if llm:
        found["kept"] = (world.logprobs(llm) - before).abs().max().item()
    found["next"] = link.refit().version
    if llm:
        found["moved"] = (world.logprobs(llm) - before).abs().max().item()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
