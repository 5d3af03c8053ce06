from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.engines import world
from tests.kl import trained

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", params=["dense", "moe"])
def policy(request: pytest.FixtureRequest) -> trained.Trained:
    """A trained model; trained once for all tests of a session."""
    return trained.train(request.param)


@pytest.fixture(scope="module")
def live(policy: trained.Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine on dummy weights of the same model."""
    folder = world.write_config(policy.model, tmp_path_factory.mktemp(policy.kind))
    llm = world.start_engine(folder, load_format="dummy")
    yield llm
    del llm
    world.forget_engines()
