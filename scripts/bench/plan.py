"""How long planning takes, as layouts double four times.

    python scripts/bench/plan.py

Each row runs in a process of its own: processor seconds, imports apart, and peak resident memory. Fails where
`fp8sync plan` takes more than 5 s or 1 GB for the largest, or grows more than 2.3 times as layouts double.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

TRAINERS = {
    64: "tp=2,pp=2,dp=16,ep=32,etp=1",
    128: "tp=4,pp=2,dp=16,ep=64,etp=1",
    256: "tp=4,pp=4,dp=16,ep=64,etp=1",
    512: "tp=8,pp=8,dp=8,ep=64,etp=1",
    1024: "tp=8,pp=16,dp=8,ep=64,etp=1",
}
LIMIT_S, LIMIT_MB, LIMIT_GROWTH = 5.0, 1000.0, 2.3
ENGINES = {n: f"tp=8,dp=4,ep,engines={n // 32}" for n in (32, 64, 128, 256, 512)}


def forecast(trainer: str, engine: str, model: str) -> dict[str, float]:
    """All of `fp8sync plan`, and the plan of one engine rank in full."""
    from fp8sync.layouts import geometry
    from fp8sync.layouts.parse import parse_engine, parse_model, parse_trainer
    from fp8sync.plan.figures import report
    from fp8sync.plan.forecast import Bandwidths
    from fp8sync.plan.traffic import traffic

    began, wall = time.process_time(), time.perf_counter()
    shape = parse_model(model)
    sides = geometry(parse_trainer(trainer), shape), geometry(parse_engine(engine), shape)
    found = traffic(*sides, gpus_per_node=Bandwidths().gpus_per_node)
    report(found, Bandwidths())
    return {
        "cpu_s": time.process_time() - began,
        "wall_s": time.perf_counter() - wall,
        "copies": found.copies,
        "links": len(found.links),
    }


def full(trainer: str, engine: str, model: str) -> dict[str, float]:
    """Every copy of every rank, from manifests: what ranks do when they connect."""
    from fp8sync.layouts import manifest
    from fp8sync.layouts.parse import parse_engine, parse_model, parse_trainer
    from fp8sync.manifest import Manifest
    from fp8sync.plan import Planner

    shape = parse_model(model)
    source = manifest(parse_trainer(trainer), shape)
    destination = manifest(parse_engine(engine), shape)
    began, wall = time.process_time(), time.perf_counter()
    planner = Planner(source, exchange_amax=True)
    indexed = time.process_time() - began
    first = min(destination.ranks)
    planner.plan(Manifest(destination.tensors, {first: destination.ranks[first]}))
    one = time.process_time() - began - indexed
    plan = planner.plan(destination)
    return {
        "cpu_s": time.process_time() - began - one,
        "wall_s": time.perf_counter() - wall,
        "copies": len(plan.copies),
        "index_s": indexed,
        "one_rank_s": one,
    }


def peak_mb() -> float:
    """This process's peak resident memory; `ru_maxrss` would be that of who started it, if larger."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def row(job: str, trainer: str, engine: str, model: str) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--job", job, "--pair", trainer, engine, "--model", model]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deepseek-v3")
    parser.add_argument("--full", action="store_true", help="also every copy of every rank")
    parser.add_argument("--job", choices=("forecast", "full"), help=argparse.SUPPRESS)
    parser.add_argument("--pair", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        figures = {"forecast": forecast, "full": full}[arguments.job](
            *arguments.pair, arguments.model
        )
        figures["peak_mb"] = peak_mb()
        print(json.dumps(figures))
        return
    print(f"{arguments.model}, Python {platform.python_version()}, {platform.machine()}")
    jobs = ["forecast", "full"] if arguments.full else ["forecast"]
    for job in jobs:
        before, growth = None, []
        for (ranks, trainer), (workers, engine) in zip(
            TRAINERS.items(), ENGINES.items(), strict=True
        ):
            figures = row(job, trainer, engine, arguments.model)
            growth += [] if before is None else [figures["cpu_s"] / before]
            before = figures["cpu_s"]
            text = "  ".join(f"{k} {v:,.6g}" for k, v in figures.items())
            print(
                f"{job}: {ranks} -> {workers} ranks  {text}"
                + "".join(f"  x{g:.2f}" for g in growth[-1:])
            )
        assert max(growth) <= LIMIT_GROWTH, f"{job}: expected growth of at most {LIMIT_GROWTH}"
        if job == "forecast":
            limits = figures["cpu_s"] <= LIMIT_S and figures["peak_mb"] <= LIMIT_MB
            assert limits, f"expected at most {LIMIT_S:g} s and {LIMIT_MB:g} MB"


if __name__ == "__main__":
    main()
