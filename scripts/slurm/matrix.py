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
from fnmatch import fnmatch
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
_LOST = "the job left no result: see its log"
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
        flags = [TRAINERS[self.trainer], engine_flags]
        if (self.trainer, self.engine) == ("fp8", "bf16"):
            flags.append("--on-format-mismatch requantize")  # refused by name unless asked for
        return {
            "CASE": self.name,
            "MODEL_PATH": model_path,
            "RECIPE": recipe,
            "RESULTS": str(results.resolve()),
            "CASE_ARGS": " ".join(filter(None, flags)),
        }


def layouts() -> dict[str, str]:
    """Return what each layout is, by name: the first comment of its script."""
    scripts = sorted(LAYOUTS.glob("*.sh"))
    return {path.stem: path.read_text(encoding="utf-8").splitlines()[1][2:] for path in scripts}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield what there is of the chosen part: FP8 parameters are Megatron's, expert axes those of models with experts."""
    chosen = (options.models, options.trainers, options.engines, options.layouts)
    for model, trainer, engine, layout in itertools.product(*chosen):
        kind = model.partition("=")[0]
        hugging_face = layout.startswith(("dp", "fsdp", "two"))
        if (trainer == "fp8" and hugging_face) or (kind == "dense" and layout.startswith("ep")):
            continue
        yield Case(kind, trainer, engine, layout)


def submit(options: argparse.Namespace) -> int:
    """Submit; with --wait until all have ended, then sum up."""
    paths = dict(pair.partition("=")[::2] for pair in options.models)
    unnamed = [name for name, path in paths.items() if not path]
    if unnamed:
        print(f"say where they are, as NAME=PATH: {', '.join(unnamed)}", file=sys.stderr)
        return 2
    jobs = []
    for case in cases(options):
        log = options.results / "logs" / f"{case.name}-%j.log"
        command = ["sbatch", "--parsable", f"--job-name={case.name}", f"--output={log}"]
        command += [*options.sbatch, str(LAYOUTS / f"{case.layout}.sh")]
        settings = case.environment(paths[case.model], options.results)
        if os.environ.get("DRYRUN"):
            print(" ".join(f"{k}={v!r}" for k, v in settings.items()), *command)
            continue
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **settings}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
        )
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"sbatch ended with {done.returncode}"
            result = options.results / f"{case.name}.json"
            result.write_text(json.dumps({"not_run": said, "failures": []}), encoding="utf-8")
            print(f"{case.name}: {said}", file=sys.stderr)
            continue
        jobs.append(done.stdout.strip().partition(";")[0])
        print(f"{jobs[-1]} {case.name}")
    if options.wait and jobs:
        _wait(jobs, options.wait)
        names = [case.name for case in cases(options)]
        return summary(options.results, names, options.may_not_run)
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


def summary(results: Path, expected: Sequence[str] = (), may_not_run: Sequence[str] = ()) -> int:
    """Print the matrix as a table.

    Args:
        results: folder of one JSON file a case.
        expected: cases that have to be there, beside those that have a log.
        may_not_run: patterns of cases that a machine need not be able to run.

    Returns:
        0 if every case passed, or was not run and may be.
    """
    found = _read(results)
    names = sorted({*_names(results), *expected})
    head = f"{'case':36} {'KL(engine‖trainer)':>18} {'KL(trainer‖engine)':>18} {'ratio':>7}"
    print(f"{head} {'fresh':>7} {'refit s':>8}  verdict")
    print(*(f"{name:36} {_line(found.get(name))}" for name in names), sep="\n")
    verdicts = [_verdict(found.get(name)) for name in names]
    passed, idle = verdicts.count("pass"), verdicts.count("not run")
    print(f"{passed} of {len(names) - idle} passed; {idle} not run")
    allowed = [
        verdict == "pass" or (verdict == "not run" and any(fnmatch(name, p) for p in may_not_run))
        for name, verdict in zip(names, verdicts, strict=True)
    ]
    return 0 if names and all(allowed) else 1


def _names(results: Path) -> set[str]:
    """Cases that left a result or a log."""
    started = {log.stem.rpartition("-")[0] for log in (results / "logs").glob("*.log")}
    return started | set(_read(results))


def _read(results: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in results.glob("*.json") if not path.name.startswith("."))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _write_page(results: Path, target: Path) -> None:
    from fp8sync.pages.verdicts import render

    found = _read(results)
    lost = {name: {"failures": [_LOST]} for name in _names(results) if name not in found}
    target.write_text(render(dict(sorted((found | lost).items()))), encoding="utf-8")


def _verdict(result: dict[str, Any] | None) -> str:
    if result is None:
        return "NO RESULT"
    if "not_run" in result:
        return "not run"
    return "FAIL" if result["failures"] or "agreement" not in result else "pass"


def _line(result: dict[str, Any] | None) -> str:
    verdict = _verdict(result)
    if result is None:
        return f"{verdict}: {_LOST}"
    if "agreement" not in result:
        return f"{verdict}: {result.get('not_run') or '; '.join(result['failures'][:3])}"
    agreement = result["agreement"]
    kl = agreement["kl_engine_trainer"], agreement["kl_trainer_engine"]
    refit_s = result["refits"][-1]["seconds"]["total"]
    fresh = result.get("fresh_difference", float("nan"))
    figures = f"{kl[0]:18.2e} {kl[1]:18.2e} {agreement['probability_ratio']:7.3f} {fresh:7.1g}"
    said = [verdict, *result["failures"][:3], *filter(None, [result.get("note")])]
    return f"{figures} {refit_s:8.3f}  {'; '.join(said)}"


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
    _may_not_run(submitting)
    submitting.add_argument("--wait", type=float, metavar="SECONDS", help="for all to end")
    summing = commands.add_parser("summary")
    summing.add_argument("results", type=Path)
    _may_not_run(summing)
    summing.add_argument("--report", type=Path, help="where to write a page (HTML)")
    options = parser.parse_args(given)
    if options.command == "list":
        print("\n".join(f"{name:16} {what}" for name, what in layouts().items()))
        print(
            f"models {', '.join(MODELS)}; trainers {', '.join(TRAINERS)}; engines {', '.join(ENGINES)}"
        )
        return 0
    if options.command == "summary":
        status = summary(options.results, (), options.may_not_run)
        if options.report:
            _write_page(options.results, options.report)
        return status
    options.sbatch = sbatch
    return submit(options)


def _may_not_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--may-not-run",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="of cases that this machine need not be able to run; without, they count as failed",
    )


if __name__ == "__main__":
    sys.exit(main())
