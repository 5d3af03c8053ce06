"""A KV-cache scale that a worker did not take over: seen by what the engine decodes, named by the audit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from fp8sync.engines.vllm.attention import AttentionInstall
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kl import trained

LAYERS = 2
STALE = "it is stale: what the trainer held at the audit before"


def scales(value: float) -> dict[str, float]:
    return {
        f"model.layers.{layer}.self_attn.attn.{kind}_scale": value * (1 + layer)
        for layer in range(LAYERS)
        for kind in "kv"
    }


@pytest.fixture(scope="module")
def cached(policy: trained.Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine with an FP8 cache."""
    folder = world.write_config(policy.model, tmp_path_factory.mktemp(f"kv-{policy.kind}"))
    llm = world.start_engine(folder, load_format="dummy", kv_cache_dtype="fp8")
    yield llm
    del llm
    world.forget_engines()


def test_stale_kv_scale_is_found_and_named(
    policy: trained.Trained, cached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.use(policy.later)
    given = scales(0.01)
    link = fp8sync.connect(policy.model, cached, world.recipe("blockwise"), kv_scales=given)
    link.refit()
    assert link.audit().equal
    assert not link.audit().unread

    given.update(scales(0.3))
    link.refit()
    sound = world.decoded_logprobs(cached)
    given.update(scales(0.01))
    link.refit()
    assert link.audit().equal
    given.update(scales(0.3))
    monkeypatch.setattr(AttentionInstall, "commit", lambda install: install.restore())
    link.refit()
    report = link.audit()
    assert {d.tensor for d in report.differences} == set(given)
    assert {d.hint for d in report.differences} == {STALE}
    assert report.differences[0].expected == pytest.approx(0.3, rel=2**-8)
    assert report.differences[0].found == pytest.approx(0.01, rel=2**-8)
    assert (world.decoded_logprobs(cached) - sound).abs().max().item() > 0.0
