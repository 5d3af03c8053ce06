"""The report's plots, each one figure about one model, as SVG elements."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from fp8sync.pages import figures
from fp8sync.pages.style import COLOR
from scripts.demo.verdict import FRESH_LIMIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scripts.demo.rounds import ModelRun


def divergence_plot(run: ModelRun) -> str:
    """KL of the stale and the fresh engine at each round, in both directions."""

    ages = {}
    for age in ("stale", "fresh"):
        pairs = [getattr(each, age) for each in run.rounds]
        forth = [pair.kl_engine_trainer for pair in pairs], {"marker": "o"}
        back = [pair.kl_trainer_engine for pair in pairs], {"marker": "x", "linestyle": "--"}
        for label, (values, options) in {
            f"{age}, engine ‖ trainer": forth,
            f"{age}, trainer ‖ engine": back,
        }.items():
            ages[label] = values, {"color": COLOR[age], **options}
    return figures.curves(
        f"{run.kind}-kl",
        ages,
        x_label="round",
        y_label="nats per token",
        limit=(FRESH_LIMIT, f"limit for fresh: {FRESH_LIMIT:g}"),
        log=True,
    )


def error_plot(run: ModelRun) -> str:
    """Signal over quantization noise by layer and projection, in the last round."""
    tensors = run.rounds[-1].report.tensors
    errors = {t.name: t.error for t in tensors if t.encoding != "plain"}
    return figures.sqnr_map(f"{run.kind}-error", figures.sqnr_by_layer(errors))


def bytes_plot(run: ModelRun) -> str:
    """Bytes of one refit beside those of the same weights in BF16."""
    report = run.rounds[-1].report
    sent: dict[str, int] = defaultdict(int)
    for tensor in report.tensors:
        sent[tensor.encoding] += tensor.bytes

    def draw(axes: Axes) -> None:
        left = 0.0
        for encoding, color, name in (
            ("blockwise", COLOR["fresh"], "FP8 codes and scales"),
            ("plain", COLOR["muted"], "plain BF16"),
        ):
            megabytes = sent[encoding] / 1e6
            axes.barh(1, megabytes, left=left, color=color, height=0.55, label=name)
            left += megabytes
        whole = 2 * run.parameters / 1e6
        axes.barh(0, whole, color=COLOR["muted"], height=0.55)
        for height, megabytes in ((1, left), (0, whole)):
            figures.note(axes, f"{megabytes:.2f} MB", (megabytes, height))
        axes.set_yticks([1, 0], ["sent", "all in BF16"])
        axes.set_xlim(0, 1.3 * max(left, whole))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("MB per refit")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    return figures.figure(draw, 1.9, f"{run.kind}-bytes")


def stages_plot(run: ModelRun) -> str:
    """Milliseconds of each stage of a refit: every round a dot, their mean a bar."""
    stages: dict[str, list[float]] = defaultdict(list)
    for each in run.rounds:
        for stage, seconds in each.report.seconds.items():
            stages[stage].append(seconds)
        stages["engine paused"].append(each.report.pause_s)
    return figures.stages(f"{run.kind}-stages", stages)
