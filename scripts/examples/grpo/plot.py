"""Draws the curves of several runs: `plot.py OUT.svg RUN.json...`"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

WINDOW = 10


def main(target: Path, runs: list[Path]) -> None:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    reward, kl = figure.subplots(1, 2)
    for path in runs:
        run = json.loads(path.read_text(encoding="utf-8"))
        steps, label = run["steps"], f"seed {run['seed']} (+{run['gain']:.2f})"
        reward.plot(_smooth([step["reward"] for step in steps]), label=label)
        kl.plot(_smooth([step["kl"] for step in steps]), label=label)
    reward.set(xlabel="step", ylabel=f"mean reward, {WINDOW} steps", ylim=(0, 1))
    kl.set(xlabel="step", ylabel="KL(engine ‖ trainer), nats per token", yscale="log")
    reward.legend(frameon=False)
    for axes in (reward, kl):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None})


def _smooth(values: list[float]) -> list[float]:
    windows = [values[max(0, n - WINDOW + 1) : n + 1] for n in range(len(values))]
    return [sum(window) / len(window) for window in windows]


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
