"""The report's plots, each one figure about one model, as SVG elements."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from scripts.demo.style import COLOR, MATPLOTLIB, themed
from scripts.demo.verdict import FRESH_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from fp8sync import TensorReport
    from scripts.demo.rounds import ModelRun

WIDTH_INCHES = 4.7


def divergence_plot(run: ModelRun) -> str:
    """KL of the stale and the fresh engine at each round, in both directions."""

    def draw(axes: Axes) -> None:
        numbers = [each.number for each in run.rounds]
        for age in ("stale", "fresh"):
            pairs = [getattr(each, age) for each in run.rounds]
            axes.plot(
                numbers,
                [pair.engine_trainer for pair in pairs],
                color=COLOR[age],
                marker="o",
                label=f"{age}, engine ‖ trainer",
            )
            axes.plot(
                numbers,
                [pair.trainer_engine for pair in pairs],
                color=COLOR[age],
                marker="x",
                linestyle="--",
                linewidth=1,
                label=f"{age}, trainer ‖ engine",
            )
        axes.axhline(FRESH_LIMIT, color=COLOR["ink"], linewidth=1, linestyle=":")
        axes.annotate(
            f"limit for fresh: {FRESH_LIMIT:g}",
            (numbers[-1], FRESH_LIMIT),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(numbers)
        axes.set_xlabel("round")
        axes.set_ylabel("nats per token")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    return _figure(draw, 3.6, f"{run.kind}-kl")


def error_plot(run: ModelRun) -> str:
    """Relative error of quantization by layer and projection, over all rounds."""

    def draw(axes: Axes) -> None:
        groups = errors_by_place([t for each in run.rounds for t in each.report.tensors])
        places = sorted(groups, reverse=True)
        for height, place in enumerate(places):
            percents = [100 * error for error in groups[place]]
            axes.plot(
                [min(percents), max(percents)],
                [height, height],
                color=COLOR["fresh"],
                linewidth=5,
                alpha=0.35,
                solid_capstyle="round",
            )
            axes.plot(fmean(percents), height, marker="o", color=COLOR["fresh"])
            _note(axes, f"{fmean(percents):.2f}", (max(percents), height))
        axes.set_xlim(0, 115 * max(max(errors) for errors in groups.values()))
        axes.set_yticks(range(len(places)), [f"layer {layer}, {part}" for layer, part in places])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("relative error, %")
        axes.set_ylim(-0.7, len(places) - 0.3)

    return _figure(draw, 4.2, f"{run.kind}-error")


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
            _note(axes, f"{megabytes:.2f} MB", (megabytes, height))
        axes.set_yticks([1, 0], ["sent", "all in BF16"])
        axes.set_xlim(0, 1.3 * max(left, whole))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("MB per refit")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    return _figure(draw, 1.9, f"{run.kind}-bytes")


def stages_plot(run: ModelRun) -> str:
    """Milliseconds of each stage of a refit: every round a dot, their mean a bar."""
    stages: dict[str, list[float]] = defaultdict(list)
    for each in run.rounds:
        for stage, seconds in each.report.seconds.items():
            stages[stage].append(1e3 * seconds)
        stages["engine paused"].append(1e3 * each.report.pause_s)

    def draw(axes: Axes) -> None:
        names = list(stages)[::-1]
        means = [fmean(stages[name]) for name in names]
        axes.barh(names, means, color=COLOR["fresh"], height=0.55, alpha=0.4)
        for name, mean in zip(names, means, strict=True):
            values = stages[name]
            axes.plot(values, [name] * len(values), "o", color=COLOR["fresh"], markersize=4)
            _note(axes, f"{mean:.1f}", (max(values), name))
        axes.set_xlim(0, 1.2 * max(max(values) for values in stages.values()))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("ms")

    return _figure(draw, 2.6, f"{run.kind}-stages")


def errors_by_place(tensors: Sequence[TensorReport]) -> dict[tuple[int, str], list[float]]:
    """Groups the errors of quantized tensors by (layer, projection); experts fall together.

    >>> errors_by_place([])
    {}
    """
    groups: dict[tuple[int, str], list[float]] = defaultdict(list)
    for tensor in tensors:
        match = re.search(r"\.layers\.(\d+)\.(.+)", tensor.name)
        if tensor.encoding != "plain" and match:
            part = re.sub(r"experts(\.\d+)?\.", "experts ", match[2])
            part = re.sub(r"^(self_attn|mlp)\.|\.weight$", "", part)
            groups[int(match[1]), part].append(tensor.error)
    return dict(groups)


def _note(axes: Axes, text: str, point: tuple[float, float | str]) -> None:
    axes.annotate(text, point, xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)


def _figure(draw: Callable[[Axes], None], height_inches: float, name: str) -> str:
    with mpl.rc_context(MATPLOTLIB):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return themed(buffer.getvalue(), name)
