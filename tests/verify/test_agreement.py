from __future__ import annotations

import math

import pytest
import torch

from fp8sync.recipe import Recipe
from fp8sync.verify import LIMITS, REGRESSION, compare, exceeded, limit_of

NAMES = {"blockwise", "blockwise-pow2", "blockwise-fp32", "bf16"}


def policies() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    engine = torch.tensor([[[0.5, 0.5], [0.75, 0.25]]]).log()
    trainer = torch.tensor([[[0.25, 0.75], [0.75, 0.25]]]).log()
    return engine, trainer, torch.tensor([[1, 0, 1]])


def test_figures_by_hand() -> None:
    found = compare(*policies())
    forth = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    back = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert found.kl_engine_trainer == pytest.approx(forth / 2, rel=1e-6)
    assert found.kl_trainer_engine == pytest.approx(back / 2, rel=1e-6)
    assert found.probability_ratio == pytest.approx((2 + 1) / 2, rel=1e-6)
    assert found.max_difference == pytest.approx(math.log(2), rel=1e-6)


def test_equal_policies_are_at_no_distance() -> None:
    engine, _, tokens = policies()
    assert set(compare(engine, engine, tokens).to_json().values()) == {0.0, 1.0}


def test_shapes_have_to_fit() -> None:
    engine, trainer, tokens = policies()
    with pytest.raises(ValueError, match="tokens"):
        compare(engine, trainer, tokens[:, 1:])


def test_every_limit_is_named_once() -> None:
    faults = exceeded(compare(*policies()), LIMITS["quantized"])
    assert [fault.partition(":")[0] for fault in faults] == [
        "kl_engine_trainer",
        "kl_trainer_engine",
        "probability_ratio",
    ]


def test_nan_keeps_no_limit() -> None:
    engine, trainer, tokens = policies()
    assert len(exceeded(compare(engine * math.nan, trainer, tokens), LIMITS["unquantized"])) == 3


def test_every_recipe_has_limits_with_a_reason() -> None:
    assert set(REGRESSION) == NAMES
    assert all(limit.reason for limit in (*LIMITS.values(), *REGRESSION.values()))
    for name in NAMES:
        narrow, wide = REGRESSION[name], limit_of(Recipe(name))
        assert narrow.kl_engine_trainer < wide.kl_engine_trainer
        assert wide.kl_engine_trainer < limit_of(Recipe(name), fp8_cache=True).kl_engine_trainer
        assert limit_of(Recipe(name), fp8_parameters=True) is LIMITS["quantized"]
