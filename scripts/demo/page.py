"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from fp8sync.doctor import environment
from fp8sync.pages.document import definitions, document, figures, table, verdict
from scripts.demo import plots
from scripts.demo.rounds import PROMPT, WINDOW_LENGTH, WINDOWS
from scripts.demo.verdict import ENGINE_TRAINER, FRESH_LIMIT, STALE_FACTOR, ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from scripts.demo.rounds import ModelRun, Round


def write_page(
    path: Path,
    runs: Sequence[ModelRun],
    seconds: Mapping[str, float],
    failures: Sequence[str],
    mode: str,
) -> None:
    """Writes the report, making its folder where there is none.

    Args:
        path: the file to write.
        runs: what to report.
        seconds: wall seconds by phase of the demo.
        failures: one sentence per condition not met.
        mode: one sentence on what the engine holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(runs, seconds, failures, mode), encoding="utf-8")


def render(
    runs: Sequence[ModelRun],
    seconds: Mapping[str, float],
    failures: Sequence[str],
    mode: str,
) -> str:
    """Returns the report as HTML; the arguments are those of `write_page`."""
    positions = WINDOWS * (WINDOW_LENGTH - 1)
    body = f"""{_verdict(failures)}
<p>The trainer teaches {_names(runs)} the sources of Python's standard library, byte by byte.
A vLLM in another process starts on random weights and is refitted after every round of
optimizer steps. {escape(mode)}.</p>

<h2>How far the engine is from the trainer</h2>
<p>Mean divergence per token of the full distributions over {positions:,} held-out bytes.
<em>Stale</em> is the engine before the refit: on random weights in round 0, on the weights of the
round before in all others. <em>Fresh</em> is the engine after it.</p>
{_pair(runs, plots.divergence_plot)}
{_rounds_table(runs)}

<h2>What quantization costs</h2>
<p>Signal over quantization noise of every weight that travels as FP8, in decibels, in the last round;
experts of a layer are averaged.</p>
{_pair(runs, plots.error_plot)}

<h2>Bytes</h2>
{_pair(runs, plots.bytes_plot)}

<h2>Seconds per stage</h2>
<p>Of <code>refit</code>, once connected. Stages overlap: the engine's worker receives while the
trainer still quantizes and sends. Bar and number: mean of the rounds; dots: each round.</p>
{_pair(runs, plots.stages_plot)}

<h2>What the engine writes</h2>
<p>After each refit, from the same prompt (grey) and seed.</p>
{_texts(runs)}

<h2>Where the time went</h2>
{table(("phase", "seconds"), [(name, f"{value:.1f}") for name, value in seconds.items()])}

<h2>Refused, or by the engine's own loader</h2>
{_exceptions(runs)}

<h2>Versions</h2>
{table(("", "version"), environment().items())}
"""
    return document("A trainer's weights in a live vLLM, as blockwise FP8", body)


def _verdict(failures: Sequence[str]) -> str:
    success = (
        f"In every round the fresh engine's {ENGINE_TRAINER} is at most {FRESH_LIMIT:g} nats per "
        f"token, and the stale engine's at least {STALE_FACTOR:g} times the fresh one's."
    )
    return verdict(failures, success)


def _exceptions(runs: Sequence[ModelRun]) -> str:
    rows = [
        (f"{run.kind}: {tensor.name}", tensor.reason)
        for run in runs
        for tensor in run.rounds[-1].report.tensors
        if tensor.route == "misc"
    ]
    return definitions(rows, "Nothing was refused; every tensor took the bulk path.")


def _names(runs: Sequence[ModelRun]) -> str:
    return " and ".join(
        f"{escape(run.architecture)} ({run.parameters / 1e6:.1f}&nbsp;M parameters)" for run in runs
    )


def _pair(runs: Sequence[ModelRun], plot: Callable[[ModelRun], str]) -> str:
    return figures((run.architecture, plot(run)) for run in runs)


def _rounds_table(runs: Sequence[ModelRun]) -> str:
    groups = (("", 3), (ENGINE_TRAINER, 3), ("KL(trainer ‖ engine)", 2), ("nats per byte", 2))
    top = "".join(f'<th colspan="{width}">{name}</th>' for name, width in groups)
    header = [
        "model",
        "round",
        "steps",
        "stale",
        "fresh",
        "stale/fresh",
        "stale",
        "fresh",
        "trainer",
        "engine",
    ]
    rows = [_cells(run, each) for run in runs for each in run.rounds]
    return table(header, rows, f"<tr>{top}</tr>")


def _cells(run: ModelRun, each: Round) -> tuple[str, ...]:
    return (
        run.kind,
        str(each.number),
        str(each.steps),
        f"{each.stale.kl_engine_trainer:.2e}",
        f"{each.fresh.kl_engine_trainer:.2e}",
        f"{ratio(each):,.0f}",
        f"{each.stale.kl_trainer_engine:.2e}",
        f"{each.fresh.kl_trainer_engine:.2e}",
        f"{each.trainer_loss:.3f}",
        f"{each.engine_loss:.3f}",
    )


def _texts(runs: Sequence[ModelRun]) -> str:
    return "".join(
        f'<p class="muted">{escape(run.kind)}, round {each.number}</p>'
        f"<pre><b>{escape(PROMPT)}</b>{escape(each.text.rstrip())}</pre>"
        for run in runs
        for each in run.rounds
    )
