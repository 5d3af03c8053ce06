"""`fp8sync verify`: the proof as a command, alone or under torchrun, with a verdict as exit status."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8sync.doctor import environment
from fp8sync.errors import Fp8SyncError
from fp8sync.recipe import Recipe

if TYPE_CHECKING:
    import argparse

__all__ = ["add_parser"]

_REQUANTIZED = "FP8 pairs that do not fit are converted, as --on-format-mismatch asks"


def add_parser(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "verify",
        help="refit a real engine from a checkpoint and prove what it holds; runs under torchrun, too",
        description=__doc__,
    )
    parser.add_argument("model", type=Path, help="folder of a BF16 Hugging Face checkpoint")
    parser.add_argument("--recipe", default="blockwise")
    parser.add_argument(
        "--trainer",
        default="replicated",
        help="replicated, fsdp2, or Megatron's axes: tp=2,pp=2,ep=4",
    )
    parser.add_argument("--fp8-parameters", action="store_true", help="of Megatron's linear layers")
    parser.add_argument(
        "--on-format-mismatch",
        choices=("error", "requantize"),
        default="error",
        help="of FP8 pairs that the engine cannot take as they are: refuse, or convert them on the way",
    )
    parser.add_argument("--engine-tp", type=int, default=1, help="tensor-parallel engine workers")
    parser.add_argument("--engine-ep", action="store_true", help="expert-parallel engine")
    parser.add_argument("--kv-cache-dtype", help="of the engine, such as fp8")
    parser.add_argument(
        "--engine-at",
        type=Path,
        metavar="FOLDER",
        help="of a host on another node or in another environment (python -m fp8sync.verify.host FOLDER)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of this node, by which engine workers reach it"
    )
    parser.add_argument("--rows", type=int, default=8, help="token sequences to compare on")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument(
        "--steps", type=int, default=2, help="refits of moved weights to compare after"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--report", type=Path, help="where to write a page (HTML)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.report and find_spec("matplotlib") is None:  # before the engine starts
        print('--report needs matplotlib: pip install ".[report]"', file=sys.stderr)
        return 2
    try:
        return _verify(arguments)
    except Fp8SyncError as error:
        if arguments.json and os.environ.get("RANK", "0") == "0":
            _write(arguments.json, {"versions": environment(), **_stopped(error)})
        raise


def _stopped(error: Fp8SyncError) -> dict[str, Any]:
    from fp8sync.verify.engines import NotRun

    if isinstance(error, NotRun):
        return {"not_run": str(error), "failures": []}
    return {"failures": [f"{type(error).__name__}: {error}"]}


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _verify(arguments: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from fp8sync.engines.vllm.probe import fp8_is_supported, placement
    from fp8sync.verify.orders import Orders
    from fp8sync.verify.run import Settings, verify
    from fp8sync.verify.trainers import load_trainer

    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if under_torchrun:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    began = time.perf_counter()
    served = Orders(arguments.engine_at).about_host() if arguments.engine_at else None
    holds_fp8 = served["fp8"] if served else fp8_is_supported()
    dequantize = Recipe(arguments.recipe).quantizes and not holds_fp8
    mismatch = arguments.on_format_mismatch
    recipe = Recipe(arguments.recipe, dequantize=dequantize, on_format_mismatch=mismatch)
    subject = load_trainer(
        arguments.model, arguments.trainer, fp8_parameters=arguments.fp8_parameters
    )
    if served is None:
        trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ.update(placement(arguments.engine_tp, trainers))
    settings = Settings(
        recipe=recipe,
        rows=arguments.rows,
        length=arguments.length,
        # The policy that Transformer Engine's parameters are compared with does not round as it moves.
        steps=0 if arguments.fp8_parameters else arguments.steps,
        seed=arguments.seed,
        engine=_engine_options(arguments),
        fp8_parameters=arguments.fp8_parameters,
        saved=arguments.model,
        host=arguments.host,
        engine_at=arguments.engine_at,
    )
    result = verify(subject, settings)
    result |= {
        "model": str(arguments.model.name),
        "trainer": f"{arguments.trainer} x {dist.get_world_size() if under_torchrun else 1}",
        "engine": f"tp{arguments.engine_tp}{' ep' if arguments.engine_ep else ''}",
        "note": "; ".join(filter(None, [subject.note, _REQUANTIZED * recipe.requantizes])),
        "seconds": time.perf_counter() - began,
        "versions": {**(served["versions"] if served else {}), **environment()},
    }
    rank = dist.get_rank() if under_torchrun else 0
    if rank == 0:
        if arguments.json:
            _write(arguments.json, result)
        if arguments.report:
            from fp8sync.pages.verdicts import render

            arguments.report.parent.mkdir(parents=True, exist_ok=True)
            arguments.report.write_text(render({result["model"]: result}), encoding="utf-8")
        print(summary(result))
    else:
        print(*(f"trainer rank {rank}: {fault}\n" for fault in result["failures"]), sep="", end="")
    if under_torchrun:
        dist.barrier()  # torchrun ends all ranks when the first one fails
        dist.destroy_process_group()
    return 1 if result["failures"] else 0


def _engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {
        "tensor_parallel_size": arguments.engine_tp,
        "enable_expert_parallel": arguments.engine_ep,
    }
    if arguments.kv_cache_dtype:
        options["kv_cache_dtype"] = arguments.kv_cache_dtype
    return options


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
