"""For every recipe: the refitted engine keeps to the limits, and equals a fresh load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from fp8sync.verify import compare, exceeded
from fp8sync.verify.limits import FRESH_DIFFERENCE
from tests.engines import world
from tests.kl import trained

if TYPE_CHECKING:
    from pathlib import Path

# An engine that holds FP8 cannot hold BF16, too; tests/engines has one of its own for that.
NAMES = ["blockwise", "blockwise-pow2", "blockwise-fp32", *([] if world.FP8 else ["bf16"])]


@pytest.mark.parametrize("name", NAMES)
def test_refitted_engine_keeps_to_the_limits(
    policy: trained.Trained, live: Any, name: str, tmp_path: Path
) -> None:
    policy.use(policy.later)
    recipe = world.recipe(name) if name != "bf16" else fp8sync.Recipe("bf16")
    link = fp8sync.connect(policy.model, live, recipe)
    report = link.refit()
    found = trained.engine_log_probabilities(live, policy.windows)
    agreement = compare(found, policy.log_probabilities(), policy.windows)
    assert exceeded(agreement, trained.limit(recipe)) == []

    formulas = {t.name: t.formula for t in report.tensors if t.encoding == "blockwise"}
    fresh = trained.fresh_engine(policy, tmp_path, formulas or None)
    expected = trained.engine_log_probabilities(fresh, policy.windows)
    world.stop_engine(fresh)
    assert (found - expected).abs().max().item() == FRESH_DIFFERENCE
    assert link.audit().equal


def test_a_stale_engine_is_beyond_the_limits(policy: trained.Trained, live: Any) -> None:
    """The limits tell one moment of training from another; otherwise they would show nothing."""
    policy.use(policy.earlier)
    recipe = world.recipe("blockwise")
    fp8sync.connect(policy.model, live, recipe).refit()
    policy.use(policy.later)
    found = trained.engine_log_probabilities(live, policy.windows)
    agreement = compare(found, policy.log_probabilities(), policy.windows)
    faults = exceeded(agreement, trained.limit(recipe))
    assert [fault.partition(":")[0] for fault in faults] == [
        "kl_engine_trainer",
        "kl_trainer_engine",
        "probability_ratio",
    ]
