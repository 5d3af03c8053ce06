"""What a forecast takes as layouts double, counted in calls, which no other load on a machine changes."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

from fp8sync.layouts import geometry
from fp8sync.layouts.parse import parse_engine, parse_model, parse_trainer
from fp8sync.plan.figures import report
from fp8sync.plan.forecast import Bandwidths
from fp8sync.plan.traffic import traffic
from scripts.bench import plan

LAYERS = 16
"""As many as the largest of these trainers has pipeline stages; DeepSeek-V3's 61 take four times as long."""


def calls_of(trainer: str, engine: str) -> int:
    """Calls, Python's and C's, of all of `fp8sync plan`."""
    count = 0

    def counted(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event.endswith("call")

    shape = replace(parse_model("deepseek-v3"), layers=LAYERS)
    sys.setprofile(counted)
    try:
        sides = geometry(parse_trainer(trainer), shape), geometry(parse_engine(engine), shape)
        found = traffic(*sides, gpus_per_node=Bandwidths().gpus_per_node)
        report(found, Bandwidths())
    finally:
        sys.setprofile(None)
    return count


def test_a_forecast_grows_less_than_layouts() -> None:
    pairs = zip(plan.TRAINERS.values(), plan.ENGINES.values(), strict=True)
    counts = [calls_of(*pair) for pair in pairs]
    assert max(b / a for a, b in pairwise(counts)) <= plan.LIMIT_GROWTH, counts


def test_the_largest_forecast_fits_into_memory() -> None:
    """Of DeepSeek-V3 whole, from 1,024 ranks to 512."""
    figures = plan.row("forecast", plan.TRAINERS[1024], plan.ENGINES[512], "deepseek-v3")
    assert figures["copies"] > 1_000_000
    assert figures["peak_mb"] <= plan.LIMIT_MB
