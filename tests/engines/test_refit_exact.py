"""A refitted engine equals a fresh one, to the last bit of every log-probability."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module", params=world.KINDS)
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(kind, an engine on dummy weights), shared by the tests of this file."""
    kind = request.param
    folder = world.write_config(world.tiny_model(kind, 0), tmp_path_factory.mktemp(kind))
    llm = world.start_engine(folder, load_format="dummy")
    yield kind, llm
    del llm
    world.forget_engines()


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_equals_a_fresh_load(live: Any, formula: str, tmp_path: Path) -> None:
    kind, llm = live
    models = [world.tiny_model(kind, seed) for seed in (1, 2)]
    expected = []
    for number, model in enumerate(models):
        fresh = world.start_engine(world.write_checkpoint(model, tmp_path / str(number), formula))
        expected.append((world.logprobs(fresh), world.generate(fresh)))
        world.stop_engine(fresh)

    for turn in (0, 1, 0):  # forth and back again
        world.generate(llm)  # fills the prefix cache with the old weights' keys and values
        report = fp8sync.refit(models[turn], llm, world.recipe(f"blockwise-{formula}"))
        assert {t.formula for t in report.tensors if t.encoding == "blockwise"} == {formula}
        found = world.logprobs(llm)
        assert (found - expected[turn][0]).abs().max().item() == 0.0
        assert world.generate(llm) == expected[turn][1]


def test_new_values_of_the_same_model(live: Any) -> None:
    """The link reads the parameters as they are at each refit, and reports what it did."""
    kind, llm = live
    model = world.tiny_model(kind, 3)
    link = fp8sync.connect(model, llm, world.recipe("blockwise"))
    first = link.refit()
    before = world.logprobs(llm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    second = link.refit()
    assert (world.logprobs(llm) - before).abs().max().item() > 0.0
    assert (first.version, second.version) == (1, 2)
    assert {t.name for t in second.tensors} == {name for name, _ in world.hf_tensors(model)}
    assert all(t.route == "bulk" for t in second.tensors)
    assert "misc: 0" in link.plan.explain()
    if link.transport.startswith("ipc"):  # one launch writes everything; errors are not measured
        assert torch.cuda.is_available()
        return
    errors = [t.error for t in second.tensors if t.encoding == "blockwise"]
    assert errors
    assert all(0.01 < e < 0.04 for e in errors)  # E4M3 keeps 3 bits: 2.6 % for Gaussian weights
