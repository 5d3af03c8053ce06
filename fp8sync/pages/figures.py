"""Figures of plain data, as SVG elements in the page's colours."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from fp8sync.pages.style import COLOR, MATPLOTLIB, themed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes

__all__ = ["bars", "curves", "figure", "note", "sqnr_by_layer", "sqnr_map", "stages"]

WIDTH_INCHES = 4.7
LEAST_DB = 6.0


def curves(
    name: str,
    series: Mapping[str, tuple[Sequence[float], dict[str, Any]]],
    *,
    x_label: str,
    y_label: str,
    limit: tuple[float, str] | None = None,
    log: bool = False,
) -> str:
    """Draw lines over 0, 1, 2, ...: by label, values and matplotlib's options."""

    def draw(axes: Axes) -> None:
        for label, (values, options) in series.items():
            axes.plot(range(len(values)), values, label=label, **options)
        if limit is not None:
            axes.axhline(limit[0], color=COLOR["ink"], linewidth=1, linestyle=":")
            axes.annotate(
                limit[1],
                (1, limit[0]),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                fontsize=9,
            )
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    return figure(draw, 3.4, name)


def sqnr_by_layer(errors: Mapping[str, float]) -> dict[tuple[int, str], float]:
    """Return decibels by (layer, projection) from relative errors by tensor; experts fall together.

    >>> sqnr_by_layer({"model.layers.3.mlp.up_proj.weight": 0.1})
    {(3, 'up_proj'): 20.0}
    """
    groups: dict[tuple[int, str], list[float]] = defaultdict(list)
    for name, error in errors.items():
        match = re.search(r"\.layers\.(\d+)\.(.+)", name)
        if match and error > 0:
            part = re.sub(r"experts(\.\d+)?\.", "experts ", match[2])
            part = re.sub(r"^(self_attn|mlp)\.|\.weight$", "", part)
            groups[int(match[1]), part].append(error)
    return {place: -20 * math.log10(fmean(found)) for place, found in groups.items()}


def sqnr_map(name: str, sqnr: Mapping[tuple[int, str], float]) -> str:
    """Draw a heat map: layers down, projections across, decibels in the cells where there is room."""
    layers = sorted({layer for layer, _ in sqnr})
    parts = sorted({part for _, part in sqnr})
    grid = [[sqnr.get((layer, part), math.nan) for part in parts] for layer in layers]

    def draw(axes: Axes) -> None:
        low, high = min(sqnr.values()), max(sqnr.values())
        if high - low < LEAST_DB:  # tenths of a decibel are not worth a colour each
            low, high = (low + high - LEAST_DB) / 2, (low + high + LEAST_DB) / 2
        shown = axes.pcolormesh(grid, cmap="viridis", vmin=low, vmax=high)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xticks([n + 0.5 for n in range(len(parts))], parts, rotation=40, ha="right")
        axes.set_yticks([n + 0.5 for n in range(len(layers))], [str(layer) for layer in layers])
        axes.set_ylabel("layer")
        for row, values in enumerate(grid if len(layers) <= 12 else []):
            for column, value in enumerate(values):
                dark = value < (low + high) / 2
                color = "white" if dark else "black"
                axes.text(
                    column + 0.5, row + 0.5, f"{value:.1f}", ha="center", va="center", color=color
                )
        scale = axes.figure.colorbar(shown, ax=axes, label="dB")
        if scale.solids is not None:
            scale.solids.set_rasterized(False)  # stays vectors

    return figure(draw, 1.8 + min(0.3 * len(layers), 6), name)


def bars(name: str, values: Mapping[str, float], *, x_label: str, unit: str) -> str:
    """Draw one bar for each label, the first one on top, with its number."""

    def draw(axes: Axes) -> None:
        labels = list(values)[::-1]
        axes.barh(labels, [values[label] for label in labels], color=COLOR["fresh"], height=0.55)
        for label in labels:
            note(axes, f"{values[label]:.3g} {unit}", (values[label], label))
        axes.set_xlim(0, 1.35 * max(values.values(), default=1))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)

    return figure(draw, 1.1 + 0.28 * len(values), name)


def stages(name: str, seconds: Mapping[str, Sequence[float]]) -> str:
    """Draw milliseconds of each stage: every refit a dot, their mean a bar."""
    millis = {stage: [1e3 * s for s in each] for stage, each in seconds.items()}

    def draw(axes: Axes) -> None:
        names = list(millis)[::-1]
        means = [fmean(millis[stage]) for stage in names]
        axes.barh(names, means, color=COLOR["fresh"], height=0.55, alpha=0.4)
        for stage, mean in zip(names, means, strict=True):
            each = millis[stage]
            axes.plot(each, [stage] * len(each), "o", color=COLOR["fresh"], markersize=4)
            note(axes, f"{mean:.1f}", (max(each), stage))
        axes.set_xlim(0, 1.2 * max(max(each) for each in millis.values()))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("ms")

    return figure(draw, 2.6, name)


def note(axes: Axes, text: str, point: tuple[float, float | str]) -> None:
    """Write beside a point."""
    axes.annotate(text, point, xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)


def figure(draw: Callable[[Axes], None], height_inches: float, name: str) -> str:
    """Return what `draw` draws, as an SVG element whose ids begin with `name`."""
    with mpl.rc_context(MATPLOTLIB):
        made = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        draw(made.subplots())
        buffer = io.StringIO()
        made.savefig(buffer, format="svg", metadata={"Date": None})
    return themed(buffer.getvalue(), name)
