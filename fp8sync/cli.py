"""The command line: what a refit will move, on paper; proof on a real engine; checkpoints."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fp8sync import doctor
from fp8sync.errors import Fp8SyncError
from fp8sync.layouts import geometry
from fp8sync.layouts.parse import parse_engine, parse_model, parse_settings, parse_trainer
from fp8sync.layouts.pieces import join_sides
from fp8sync.layouts.saved import saved_manifest
from fp8sync.plan.bucket import DEFAULT_BUCKET_BYTES
from fp8sync.plan.figures import figures, report
from fp8sync.plan.forecast import Bandwidths
from fp8sync.plan.spread import side_of
from fp8sync.plan.traffic import traffic
from fp8sync.recipe import Formula, Recipe
from fp8sync.verify import command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp8sync.layouts import Layout, ModelShape
    from fp8sync.plan.spread import Side

__all__ = ["main"]

_EXAMPLE = """\
example:
  fp8sync plan --model deepseek-v3 --trainer tp=8,pp=16,dp=8,ep=64,etp=1 \\
               --engine tp=8,dp=4,ep,engines=16
"""


_EXPORTS = """\
examples:
  fp8sync export Qwen3-30B-A3B Qwen3-30B-A3B-FP8 --format fp8
  fp8sync export run/iter_0000100 step-100 --format bf16 --config Qwen3-30B-A3B
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        argv: arguments after the program's name; `sys.argv` if not given.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (Fp8SyncError, ValueError, OSError) as error:
        print(f"fp8sync: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fp8sync", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    plan = commands.add_parser(
        "plan",
        help="what a refit will move: bytes per link, messages, memory, time, misc list",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("--model", help="preset (deepseek-v3, ...) or a config.json")
    plan.add_argument("--trainer", required=True, help="layout, or a saved manifest (.json)")
    plan.add_argument(
        "--engine",
        required=True,
        action="append",
        help="layout, or a saved manifest (.json); repeat for several engines fed together",
    )
    plan.add_argument("--bandwidth", default="", help="such as node_gb_s=366,network_gb_s=50")
    plan.add_argument("--bucket-bytes", type=int, default=DEFAULT_BUCKET_BYTES)
    plan.add_argument(
        "--on-format-mismatch",
        choices=("error", "requantize"),
        default="error",
        help="of FP8 pairs that the engine cannot take as they are: refuse, or convert them on the way",
    )
    plan.add_argument("--top", type=int, default=10, help="how many links to print")
    plan.add_argument("--json", action="store_true", help="figures as JSON")
    plan.set_defaults(run=_plan)
    export = commands.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face directory, in BF16 or blockwise FP8",
        epilog=_EXPORTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument(
        "source",
        type=Path,
        help="a Hugging Face directory, or a Megatron distributed checkpoint (torch_dist)",
    )
    export.add_argument("folder", type=Path, help="what to write")
    export.add_argument(
        "--config",
        type=Path,
        help="a Hugging Face directory with the model's config.json, for a Megatron checkpoint",
    )
    export.add_argument("--format", choices=("bf16", "fp8"), required=True)
    export.add_argument(
        "--formula",
        choices=[f.value for f in Formula],
        help="of FP8 scales; by default that of the source's FP8 pairs, or pow2",
    )
    export.add_argument(
        "--unquantized",
        action="append",
        metavar="PATTERN",
        help="modules to leave in BF16, such as 'model.layers.0.*'; repeat for more",
    )
    export.add_argument(
        "--shard-bytes", type=int, default=5_000_000_000, help="largest file (%(default)s)"
    )
    export.set_defaults(run=_export)
    command.add_parser(commands)
    doctor.add_parser(commands)
    return parser


def _plan(arguments: argparse.Namespace) -> int:
    for name, least in (("bucket_bytes", 1), ("top", 0)):
        if (found := getattr(arguments, name)) < least:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected at least {least}, found {found}")
    with _named("--model"):
        model = parse_model(arguments.model) if arguments.model else None
    with _named("--trainer"):
        source = _side(arguments.trainer, parse_trainer, model)
    with _named("--engine"):
        engines = [_side(text, parse_engine, model) for text in arguments.engine]
    with _named("--bandwidth"):
        bandwidths = parse_settings(Bandwidths, arguments.bandwidth)
    per_node = bandwidths.gpus_per_node
    anew = arguments.on_format_mismatch == "requantize"
    about = source, join_sides(engines), arguments.bucket_bytes, per_node
    found = traffic(*about, requantize=anew)
    if arguments.json:
        print(json.dumps(figures(found, bandwidths, arguments.top), indent=1))
    else:
        print(report(found, bandwidths, arguments.top))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    # These need torch, which planning does not.
    from fp8sync.export import export_checkpoint
    from fp8sync.sources.megatron.distributed import (
        DistributedCheckpointSource,
        holds_distributed_checkpoint,
    )

    if arguments.format == "bf16" and (arguments.formula or arguments.unquantized):
        raise ValueError("--formula and --unquantized are of --format fp8, not of bf16")
    kind = f"blockwise-{arguments.formula}" if arguments.formula else "blockwise"
    patterns = (*Recipe().unquantized, *(arguments.unquantized or ()))
    recipe = Recipe("bf16" if arguments.format == "bf16" else kind, unquantized=patterns)
    folder, source = arguments.source, arguments.source
    if holds_distributed_checkpoint(folder):
        if arguments.config is None:
            raise ValueError(f"{folder} is a Megatron checkpoint; say of which model with --config")
        source = DistributedCheckpointSource.of(folder, arguments.config)
    made = export_checkpoint(
        source,
        arguments.folder,
        recipe,
        config=arguments.config,
        shard_bytes=arguments.shard_bytes,
    )
    print(
        f"{made.folder}: {made.tensors} tensors, {made.quantized} in FP8, "
        f"{made.bytes} bytes in {made.files} files"
    )
    return 0


def _side(text: str, parse: Callable[[str], Layout], model: ModelShape | None) -> Side:
    if text.endswith(".json"):
        return side_of(saved_manifest(Path(text)))
    if model is None:
        raise ValueError(f"{text!r} is a layout: say of which --model")
    return geometry(parse(text), model)


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Say which option could not be understood."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
