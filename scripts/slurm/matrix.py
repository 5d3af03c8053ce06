"""The matrix of refits to try on a cluster: list it, submit it, sum it up.

    python scripts/slurm/matrix.py list
    python scripts/slurm/matrix.py submit --models dense=/path/to/Qwen3-8B --layouts fsdp2_tp2 -- --account=A
    python scripts/slurm/matrix.py summary results

`DRYRUN=1` prints what would be submitted. Options of sbatch follow `--`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ROOT / "scripts" / "slurm" / "layouts"
MODELS = ("dense", "gated-moe", "hybrid", "mla")
TRAINERS = {"bf16": "", "fp8": "--fp8-parameters"}
ENGINES = {
    "bf16": ("bf16", ""),
    "fp8": ("blockwise", ""),
    "fp8-kv": ("blockwise", "--kv-cache-dtype fp8"),
}
_DONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}


@dataclass(frozen=True)
class Case:
    """One job."""

    model: str
    trainer: str
    engine: str
    layout: str

    @property
    def name(self) -> str:
        """Of the job, its log and its result."""
        return f"{self.model}_{self.trainer}_{self.engine}_{self.layout}"

    def environment(self, model_path: str, results: Path) -> dict[str, str]:
        """Return what the layout's script reads."""
        recipe, engine_flags = ENGINES[self.engine]
        flags = f"{TRAINERS[self.trainer]} {engine_flags}".strip()
        return {
            "CASE": self.name,
            "MODEL_PATH": model_path,
            "RECIPE": recipe,
            "RESULTS": str(results.resolve()),
            "CASE_ARGS": flags,
        }


def layouts() -> dict[str, str]:
    """Return what each layout is, by name: the first comment of its script."""
    scripts = sorted(LAYOUTS.glob("*.sh"))
    return {path.stem: path.read_text(encoding="utf-8").splitlines()[1][2:] for path in scripts}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the chosen part of the matrix; FP8 parameters are Megatron's alone."""
    chosen = (options.models, options.trainers, options.engines, options.layouts)
    for model, trainer, engine, layout in itertools.product(*chosen):
        hugging_face = layout.startswith(("dp", "fsdp", "two"))
        if not (trainer == "fp8" and hugging_face):
            yield Case(model.partition("=")[0], trainer, engine, layout)


def submit(options: argparse.Namespace) -> int:
    """Submit; with --wait until all have ended, then sum up."""
    paths = dict(pair.partition("=")[::2] for pair in options.models)
    unnamed = [name for name, path in paths.items() if not path]
    if unnamed:
        print(f"say where they are, as NAME=PATH: {', '.join(unnamed)}", file=sys.stderr)
        return 2
    (options.results / "logs").mkdir(parents=True, exist_ok=True)
    jobs = []
    for case in cases(options):
        log = options.results / "logs" / f"{case.name}-%j.log"
        command = ["sbatch", "--parsable", f"--job-name={case.name}", f"--output={log}"]
        command += [*options.sbatch, str(LAYOUTS / f"{case.layout}.sh")]
        settings = case.environment(paths[case.model], options.results)
        if os.environ.get("DRYRUN"):
            print(" ".join(f"{k}={v!r}" for k, v in settings.items()), *command)
            continue
        environment = {**os.environ, **settings}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        )
        jobs.append(done.stdout.strip().partition(";")[0])
        print(f"{jobs[-1]} {case.name}")
    if options.wait and jobs:
        _wait(jobs, options.wait)
        return summary(options.results, [case.name for case in cases(options)])
    return 0


def _wait(jobs: Sequence[str], limit_s: float) -> None:
    ends = time.monotonic() + limit_s
    open_jobs = set(jobs)
    while open_jobs and time.monotonic() < ends:
        time.sleep(2)
        for job in sorted(open_jobs):
            command = ["scontrol", "show", "job", "-o", job]
            said = subprocess.run(command, check=False, capture_output=True, text=True)
            state = said.stdout.partition("JobState=")[2].partition(" ")[0]
            if said.returncode or state in _DONE:
                open_jobs.discard(job)
    for job in sorted(open_jobs):
        print(f"{job} did not end within {limit_s:g} s", file=sys.stderr)


def summary(results: Path, expected: Sequence[str] = ()) -> int:
    """Print the matrix as a table; 0 if all that is expected, or is there, passed."""
    found = {
        p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob("*.json"))
    }
    names = sorted({*found, *expected})
    head = f"{'case':36} {'KL(engine‖trainer)':>18} {'KL(trainer‖engine)':>18} {'ratio':>7}"
    print(f"{head} {'fresh':>7} {'refit s':>8}  verdict")
    bad = [name for name in names if not _passed(found.get(name))]
    for name in names:
        print(_line(name, found.get(name)))
    for name in bad:
        faults = found[name]["failures"] if name in found else ["no result: see its log"]
        print(f"{name}: " + "; ".join(faults[:3]))
    print(f"{len(names) - len(bad)} of {len(names)} passed")
    return 1 if bad or not names else 0


def _write_page(results: Path, target: Path) -> None:
    from fp8sync.pages.verdicts import render

    found = {
        p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob("*.json"))
    }
    target.write_text(render(found), encoding="utf-8")


def _passed(result: dict[str, Any] | None) -> bool:
    return result is not None and not result["failures"]


def _line(name: str, result: dict[str, Any] | None) -> str:
    if result is None:
        return f"{name:36} {'':18} {'':18} {'':7} {'':7} {'':8}  NO RESULT"
    agreement = result["agreement"]
    kl = agreement["kl_engine_trainer"], agreement["kl_trainer_engine"]
    refit_s = result["refits"][-1]["seconds"]["total"]
    fresh = result.get("fresh_difference", float("nan"))
    figures = f"{kl[0]:18.2e} {kl[1]:18.2e} {agreement['probability_ratio']:7.3f} {fresh:7.1g}"
    return f"{name:36} {figures} {refit_s:8.3f}  {'pass' if _passed(result) else 'FAIL'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    given, sbatch = given[:cut], given[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    submitting = commands.add_parser("submit")
    submitting.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH")
    submitting.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    submitting.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    submitting.add_argument("--layouts", nargs="+", choices=layouts(), default=list(layouts()))
    submitting.add_argument("--results", type=Path, default=Path("results"))
    submitting.add_argument("--wait", type=float, metavar="SECONDS", help="for all to end")
    summing = commands.add_parser("summary")
    summing.add_argument("results", type=Path)
    summing.add_argument("--report", type=Path, help="where to write a page (HTML)")
    options = parser.parse_args(given)
    if options.command == "list":
        print("\n".join(f"{name:16} {what}" for name, what in layouts().items()))
        print(
            f"models {', '.join(MODELS)}; trainers {', '.join(TRAINERS)}; engines {', '.join(ENGINES)}"
        )
        return 0
    if options.command == "summary":
        status = summary(options.results)
        if options.report:
            _write_page(options.results, options.report)
        return status
    options.sbatch = sbatch
    return submit(options)


if __name__ == "__main__":
    sys.exit(main())
