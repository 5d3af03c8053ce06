"""Each known bug of the field, in a real engine: found by the policies' divergence, named by the audit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from fp8sync.verify import compare, exceeded
from fp8sync.verify.limits import FRESH_DIFFERENCE
from tests.engines import world
from tests.kl import trained
from tests.kl.damage import DAMAGES, Damage

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def live(policy: trained.Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine whose kernels take scales of any size.

    Powers of two rarely move while a model trains, and neighbours share them: a stale one is then the
    right one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_DEEP_GEMM", "0")
        yield from trained.live_engine(policy, tmp_path_factory)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name.replace(" ", "-"))
def test_bug_is_found_and_named(
    policy: trained.Trained, live: Any, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    if policy.kind not in damage.kinds:
        assert not damage.tensors(world.hf_tensors(policy.model), "fp32")
        return
    # Each kernel's own formula: the audit cannot read codes that a kernel has quantized anew.
    recipe = world.recipe("blockwise")
    policy.use(policy.later)
    fp8sync.connect(policy.model, live, recipe, transport="gloo").refit()
    sound = trained.engine_log_probabilities(live, policy.windows)

    policy.use(policy.earlier)
    damage.inject(monkeypatch)
    link = fp8sync.connect(policy.model, live, recipe, transport="gloo")
    link.refit()
    assert link.audit().equal
    policy.use(policy.later)
    link.refit()
    found = trained.engine_log_probabilities(live, policy.windows)
    agreement = compare(found, policy.log_probabilities(), policy.windows)
    assert (found - sound).abs().max().item() > FRESH_DIFFERENCE
    if recipe.dequantize:  # an FP8 engine's own rounding hides the mildest of them from this limit
        assert exceeded(agreement, trained.limit(recipe))

    report = link.audit()
    wrong = damage.tensors(world.hf_tensors(policy.model), "fp32")
    assert {d.tensor for d in report.differences} == wrong
    first = report.differences[0]
    assert first.hint.startswith(damage.says(first.tensor))
