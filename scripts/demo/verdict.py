"""What every round must show, as a list of what failed; and the table of what it showed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.demo.rounds import ModelRun, Round

FRESH_LIMIT = 1e-2
STALE_FACTOR = 3.0
ENGINE_TRAINER = "KL(engine ‖ trainer)"


def failures(runs: tuple[ModelRun, ...]) -> list[str]:
    """Judges every round of every model.

    Returns:
        One sentence for each condition not met; empty if all are. A NaN meets none.
    """
    return [
        f"{run.kind}, round {each.number}: {fault}"
        for run in runs
        for each in run.rounds
        for fault in _faults(each)
    ]


def table(runs: tuple[ModelRun, ...]) -> str:
    """The rounds as aligned text, one line each."""
    groups = f"{'':16} {ENGINE_TRAINER:>22} {'KL(trainer ‖ engine)':>22} {'stale/':>9} "
    groups += f"{'nats per byte':>17} {'sent':>9} {'refit':>8}"
    columns = f"{'model  round':16} {'stale':>11}{'fresh':>11} {'stale':>11}{'fresh':>11} "
    columns += f"{'fresh':>9} {'trainer':>9}{'engine':>8} {'MB':>9} {'ms':>8}"
    lines = [_line(run.kind, each) for run in runs for each in run.rounds]
    return "\n".join([groups, columns, *lines])


def _faults(each: Round) -> list[str]:
    stale, fresh = each.stale.kl_engine_trainer, each.fresh.kl_engine_trainer
    faults = []
    # Both are written so that a NaN, of which every comparison is false, is a fault.
    if not fresh <= FRESH_LIMIT:
        faults.append(f"fresh {ENGINE_TRAINER} is {fresh:.2e}, above the limit {FRESH_LIMIT:.0e}")
    if not stale >= STALE_FACTOR * fresh:
        faults.append(
            f"stale {ENGINE_TRAINER} is {stale:.2e}, less than {STALE_FACTOR:g} times "
            f"the fresh {fresh:.2e}"
        )
    return faults


def ratio(each: Round) -> float:
    """How many times further from the trainer the stale engine is than the fresh one."""
    fresh = each.fresh.kl_engine_trainer
    return each.stale.kl_engine_trainer / fresh if fresh > 0 else math.inf


def _line(kind: str, each: Round) -> str:
    report = each.report
    return (
        f"{kind:6} {each.number:5}{'':4} "
        f"{each.stale.kl_engine_trainer:11.2e}{each.fresh.kl_engine_trainer:11.2e} "
        f"{each.stale.kl_trainer_engine:11.2e}{each.fresh.kl_trainer_engine:11.2e} "
        f"{ratio(each):9.0f} {each.trainer_loss:9.3f}{each.engine_loss:8.3f} "
        f"{report.bytes_sent / 1e6:9.2f} {report.seconds['total'] * 1e3:8.0f}"
    )
