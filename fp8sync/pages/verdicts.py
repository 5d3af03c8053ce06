"""The page of `fp8sync verify`, and of a whole matrix of its results."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from fp8sync.pages import figures
from fp8sync.pages.document import definitions, document, section, table, verdict
from fp8sync.pages.document import figures as side_by_side
from fp8sync.pages.style import COLOR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["render"]

Result = dict[str, Any]
_LINKS = 12
_STOPPED: Result = {
    "refits": [],
    "errors": {},
    "links": [],
    "unread": {},
    "misc": {},
    "versions": {},
}
"""Of a run that an error stopped before there were any figures."""


def render(written: Mapping[str, Result]) -> str:
    """Return the page of results by name, as `fp8sync verify --json` writes them."""
    idle = {name: result["not_run"] for name, result in written.items() if "not_run" in result}
    results = {name: _STOPPED | r for name, r in written.items() if name not in idle}
    failures = [f"{name}: {f}" for name, result in results.items() for f in result["failures"]]
    kept = f"{len(results)} of {len(results)} kept to every limit."
    success = kept if results else "Nothing was run."
    if idle:
        success += f" {len(idle)} not run, for reasons below."
    parts = [
        verdict(failures, success),
        section("Policies", _ABOUT_POLICIES, _policies(results)),
        section("Not run", "", definitions(idle.items(), "Every case ran.")),
        section("Policies over refits", _ABOUT_OVER, _each(results, _divergence, "Not compared.")),
        section(
            "Error over refits",
            "Relative error of quantization, mean over the tensors that travel as FP8; all refits, "
            "that of junk left out.",
            _each(results, _error, "Nothing was quantized, or errors were not measured."),
        ),
        section(
            "What quantization costs",
            "Signal over quantization noise of every weight that travels as FP8, in decibels; "
            "experts of a layer are averaged.",
            _each(results, _errors, "Nothing was quantized, or errors were not measured."),
        ),
        section("Bytes per link", _ABOUT_LINKS, _each(results, _links, "Nothing was sent.")),
        section(
            "Seconds per stage", _ABOUT_STAGES, _each(results, _stages, "Nothing was refitted.")
        ),
        section("Refused, not read, or by the engine's own loader", "", _exceptions(results)),
        section("Versions", "", _versions(results)),
    ]
    return document("fp8sync: what a live engine holds after a refit", "".join(parts))


_ABOUT_POLICIES = (
    "Mean divergence per token, in nats, on tokens that the engine drew; the mean ratio of the "
    "probabilities of those tokens; and the largest difference from an engine that loaded the same "
    "bytes from a checkpoint, which has to be zero."
)
_ABOUT_OVER = (
    "First the trainer's weights; then every matrix is made 1 % larger before each further refit. An "
    "engine that missed one of them would be far from its trainer."
)
_ABOUT_LINKS = "From trainer rank to engine rank, in one refit; the busiest ones."
_ABOUT_STAGES = "Of each refit, once connected. Stages overlap. Bar: mean; dots: each refit."


def _policies(results: Mapping[str, Result]) -> str:
    header = ("", "KL(engine ‖ trainer)", "KL(trainer ‖ engine)", "ratio", "fresh load", "verdict")
    rows = []
    for name, result in results.items():
        found = result.get("agreement")
        rows.append(
            (
                name,
                f"{found['kl_engine_trainer']:.2e}" if found else "–",
                f"{found['kl_trainer_engine']:.2e}" if found else "–",
                f"{found['probability_ratio']:.3f}" if found else "–",
                f"{result['fresh_difference']:g}" if "fresh_difference" in result else "not asked",
                "failed" if result["failures"] else "passed",
            )
        )
    return table(header, rows)


def _each(results: Mapping[str, Result], draw: Any, nothing: str) -> str:
    drawn = [(name, draw(f"r{n}", each)) for n, (name, each) in enumerate(results.items())]
    return (
        side_by_side((n, svg) for n, svg in drawn if svg) if any(s for _, s in drawn) else nothing
    )


def _errors(prefix: str, result: Result) -> str:
    # NaN (an error that was not measured) is not above zero.
    sqnr = figures.sqnr_by_layer({n: e for n, e in result["errors"].items() if e and e > 0})
    return figures.sqnr_map(f"{prefix}-sqnr", sqnr) if sqnr else ""


def _divergence(prefix: str, result: Result) -> str:
    compared = [refit["agreement"] for refit in result["refits"] if "agreement" in refit]
    if not compared:
        return ""
    limit = result["limit"]["kl_engine_trainer"]
    lines = {
        "engine ‖ trainer": ("kl_engine_trainer", {"marker": "o", "color": COLOR["fresh"]}),
        "trainer ‖ engine": (
            "kl_trainer_engine",
            {"marker": "x", "linestyle": "--", "color": COLOR["stale"]},
        ),
    }
    return figures.curves(
        f"{prefix}-kl",
        {label: ([each[key] for each in compared], look) for label, (key, look) in lines.items()},
        x_label="refit compared",
        y_label="nats per token",
        limit=(limit, f"limit: {limit:g}"),
        log=True,
    )


def _error(prefix: str, result: Result) -> str:
    errors = [r["error"] for r in result["refits"] if r["weights"] != "junk" and r["error"]]
    look = {"marker": "o", "color": COLOR["fresh"]}
    series = {"‖dequantized - w‖ / ‖w‖": (errors, look)}
    if not errors:
        return ""
    return figures.curves(f"{prefix}-error", series, x_label="refit", y_label="relative error")


def _links(prefix: str, result: Result) -> str:
    if not result["links"]:
        return ""
    busiest = sorted(result["links"], key=lambda link: -link[2])[:_LINKS]
    megabytes = {f"{source} → {to}": nbytes / 1e6 for source, to, nbytes in busiest}
    return figures.bars(f"{prefix}-links", megabytes, x_label="MB", unit="MB")


def _stages(prefix: str, result: Result) -> str:
    if not result["refits"]:
        return ""
    seconds: dict[str, list[float]] = defaultdict(list)
    for refit in result["refits"]:
        for stage, value in refit["seconds"].items():
            seconds[stage].append(value)
        seconds["engine paused"].append(refit["pause_s"])
    return figures.stages(f"{prefix}-stages", seconds)


def _exceptions(results: Mapping[str, Result]) -> str:
    rows: list[tuple[str, str]] = []
    for name, result in results.items():
        for kind in ("unread", "misc"):
            rows += [(f"{name}: {t}", f"{kind}: {why}") for t, why in result[kind].items()]
        rows += [(name, f"refused: {each}") for each in result.get("refused", ())]
    return definitions(rows, "Every tensor took the bulk path and was read back; none was refused.")


def _versions(results: Mapping[str, Result]) -> str:
    names: Sequence[str] = list(dict.fromkeys(n for r in results.values() for n in r["versions"]))
    said = {n: {r["versions"][n] for r in results.values() if n in r["versions"]} for n in names}
    return table(("", "version"), [(n, ", ".join(sorted(said[n]))) for n in names])
