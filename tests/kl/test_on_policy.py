"""True on policy: where both sides do the same arithmetic, their log-probabilities are equal to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from tests.kl import trained

pytestmark = pytest.mark.skipif(world.FP8, reason="an FP8 engine rounds activations, too")


def rounded(model: Any, formula: str) -> Callable[[str], torch.Tensor]:
    """The policy's weights, each matrix rounded as the recipe rounds it."""

    def weight(name: str) -> torch.Tensor:
        held = model.get_parameter(name).data
        if not name.endswith("_proj.weight"):
            return held
        pair = quantize_blockwise(held, formula)
        return dequantize_blockwise(pair.weight, pair.scale_inv, held.dtype)

    return weight


@pytest.mark.parametrize("policy", ["dense"], indirect=True)
@pytest.mark.parametrize("formula", ["pow2", "fp32", None])
def test_trainer_and_engine_say_the_same(
    policy: trained.Trained, live: Any, formula: str | None
) -> None:
    from tests.kl.on_policy import log_probabilities

    policy.use(policy.later)
    recipe = world.recipe(f"blockwise-{formula}") if formula else fp8sync.Recipe("bf16")
    fp8sync.connect(policy.model, live, recipe).refit()
    weights = (
        rounded(policy.model, formula)
        if formula
        else lambda name: policy.model.get_parameter(name).data
    )
    for row in policy.windows.tolist():
        said = log_probabilities(policy.model, weights, row)
        found = world.logprobs(live, row)
        assert (said.double() - found).abs().max().item() == 0.0
