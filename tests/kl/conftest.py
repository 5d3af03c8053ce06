from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.kl import trained

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", params=["dense", "moe"])
def policy(request: pytest.FixtureRequest) -> trained.Trained:
    """A trained model."""
    return trained.train(request.param)


@pytest.fixture(scope="module")
def live(policy: trained.Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine on dummy weights of the same model."""
    yield from trained.live_engine(policy, tmp_path_factory)
