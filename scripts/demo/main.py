"""The demo: both models through all rounds, a table, a report, a verdict."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fp8sync.engines.vllm import probe
from scripts.demo import verdict
from scripts.demo.corpus import read_corpus
from scripts.demo.models import KINDS
from scripts.demo.rounds import run_model

if TYPE_CHECKING:
    from scripts.demo.stopwatch import Stopwatch

REPORT = Path("reports/demo.html")
LIMIT_S = 300.0


def main(stopwatch: Stopwatch, arguments: list[str] | None = None) -> int:
    """Runs the demo.

    Args:
        stopwatch: counts the phases; the total is since it was made.
        arguments: of the command line.

    Returns:
        0 if every round met the limits and all of it the limit of time, else 1.
    """
    options = _parser().parse_args(arguments)
    # Matrices this small gain little from a second thread, and lose much when the other core is busy.
    torch.set_num_threads(1)
    fp8 = probe.fp8_is_supported()
    mode = _mode(fp8=fp8)
    print(mode, flush=True)
    with stopwatch.phase("read the text"):
        text = read_corpus()
    runs = tuple(run_model(kind, text, stopwatch, fp8=fp8) for kind in options.models)
    failures = verdict.failures(runs)
    with stopwatch.phase("write the report"):
        from scripts.demo.page import write_page

        write_page(
            options.report, runs, stopwatch.seconds | {"total": stopwatch.total()}, failures, mode
        )
    print(f"\n{verdict.table(runs)}\n")
    total_s = stopwatch.total()
    print(_time_line(stopwatch, total_s, options.limit))
    print(f"report: {options.report}")
    if total_s > options.limit:
        failures = [*failures, f"it took {total_s:.0f} s: expected at most {options.limit:g} s"]
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if not failures:
        print(
            f"ok: in every round, fresh {verdict.ENGINE_TRAINER} <= {verdict.FRESH_LIMIT:g} and "
            f"stale >= {verdict.STALE_FACTOR:g} x fresh"
        )
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--report", type=Path, default=REPORT, help="default: %(default)s")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S", help="seconds; default: %(default)g"
    )
    return parser


def _mode(*, fp8: bool) -> str:
    if fp8:
        return "The engine holds blockwise FP8"
    return (
        "The engine holds BF16, because this processor has no AMX, which vLLM's FP8 needs; "
        "the weights still travel as FP8 and are dequantized on arrival"
    )


def _time_line(stopwatch: Stopwatch, total_s: float, limit_s: float) -> str:
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stopwatch.seconds.items())
    return f"seconds: {phases}; total {total_s:.0f} of {limit_s:g}"
