"""The audit against real engines: what is equal is called equal, and one changed element is found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module", params=["dense", "moe"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(kind, an engine on dummy weights), shared by the tests of this file."""
    kind = request.param
    folder = world.write_config(world.tiny_model(kind, 0), tmp_path_factory.mktemp(kind))
    llm = world.start_engine(folder, load_format="dummy")
    yield kind, llm
    del llm
    world.forget_engines()


def test_snapshot_junk_refit_compare(live: Any) -> None:
    """Every tensor is read, differs while the engine holds other weights, and is equal afterwards."""
    kind, llm = live
    model, recipe = world.tiny_model(kind, 1), world.recipe("blockwise")
    link = fp8sync.connect(model, llm, recipe)
    link.refit()
    snapshot = link.audit()
    assert snapshot.equal
    assert not snapshot.unread
    assert {e.tensor for e in snapshot.entries} == set(link.plan.plan.tensors)

    junk = world.tiny_model(kind, 2)
    with torch.no_grad():
        for parameter in junk.parameters():
            parameter.uniform_(-1, 1)
    fp8sync.connect(junk, llm, recipe).refit()
    link = fp8sync.connect(model, llm, recipe)
    other = link.audit()
    assert {d.tensor for d in other.differences} == set(link.plan.plan.tensors)

    link.refit()
    assert link.audit() == snapshot


def test_reading_changes_nothing(live: Any) -> None:
    kind, llm = live
    link = fp8sync.connect(world.tiny_model(kind, 1), llm, world.recipe("blockwise"))
    link.refit()
    before = world.logprobs(llm), world.live_bytes(llm)
    assert link.audit().equal
    assert torch.equal(world.logprobs(llm), before[0])
    assert world.live_bytes(llm) == before[1]


def test_one_changed_element_is_found_where_it_is(live: Any) -> None:
    kind, llm = live
    model = world.tiny_model(kind, 1)
    link = fp8sync.connect(model, llm, world.recipe("blockwise"))
    link.refit()
    with torch.no_grad():
        model.model.embed_tokens.weight[77, 5] += 1.0
    report = link.audit()
    (difference,) = report.differences
    assert difference.tensor == "model.embed_tokens.weight"
    assert difference.coordinate == (77, 5)
    assert difference.expected == model.model.embed_tokens.weight[77, 5].item()
    assert "DIFFERS" in report.explain()
