"""`fp8sync verify`: the proof as a command, alone or under torchrun, with a verdict as exit status."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8sync.doctor import environment
from fp8sync.recipe import Recipe

if TYPE_CHECKING:
    import argparse

__all__ = ["add_parser"]

TRAINERS = ("replicated", "fsdp2")


def add_parser(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "verify",
        help="refit a real engine from a checkpoint and prove what it holds; runs under torchrun, too",
        description=__doc__,
    )
    parser.add_argument("model", type=Path, help="folder of a BF16 Hugging Face checkpoint")
    parser.add_argument("--recipe", default="blockwise")
    parser.add_argument("--trainer", choices=TRAINERS, default="replicated")
    parser.add_argument("--engine-tp", type=int, default=1, help="tensor-parallel engine workers")
    parser.add_argument("--rows", type=int, default=8, help="token sequences to compare on")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from fp8sync.engines.vllm.probe import fp8_is_supported
    from fp8sync.verify.run import Settings, verify

    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if under_torchrun:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    began = time.perf_counter()
    quantizes = Recipe(arguments.recipe).quantizes
    recipe = Recipe(arguments.recipe, dequantize=quantizes and not fp8_is_supported())
    model, config = _trainer(arguments.model, arguments.trainer)
    settings = Settings(
        recipe=recipe,
        rows=arguments.rows,
        length=arguments.length,
        seed=arguments.seed,
        engine={"tensor_parallel_size": arguments.engine_tp},
        saved=arguments.model,
    )
    result = verify(model, config, settings)
    result |= {
        "model": str(arguments.model.name),
        "trainer": f"{arguments.trainer} x {dist.get_world_size() if under_torchrun else 1}",
        "engine": f"tp{arguments.engine_tp}",
        "seconds": time.perf_counter() - began,
        "versions": environment(),
    }
    leads = not under_torchrun or dist.get_rank() == 0
    if under_torchrun:
        dist.destroy_process_group()
    if leads:
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(summary(result))
    return 1 if result["failures"] else 0


def _trainer(path: Path, kind: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    if torch.cuda.is_available():
        model = model.cuda()
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model, model.config


def summary(result: dict[str, Any]) -> str:
    """Return a result as text, the verdict last."""
    held = ", dequantized" if result["dequantized"] else ""
    sides = f"trainer {result['trainer']}, engine {result['engine']}"
    counts = f"{result['tensors']} tensors, {len(result['unread'])} not read"
    lines = [
        f"{result['model']}: {sides}, recipe {result['recipe']}{held}, {result['transport']}",
        f"audit: {counts}, {len(result['misc'])} by the engine's own loader",
    ]
    if "agreement" in result:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in result["agreement"].items())
        lines.append(f"policies: {figures}")
    if "fresh_difference" in result:
        lines.append(f"against a fresh load: {result['fresh_difference']:g}")
    lines += [f"FAILED {fault}" for fault in result["failures"]]
    lines.append(f"{'failed' if result['failures'] else 'ok'} in {result['seconds']:.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    from fp8sync.cli import main

    sys.exit(main(["verify", *sys.argv[1:]]))
