"""Hypothesis for this folder: the same examples in every run, no deadline on a busy machine; one fixture."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "unit",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unit")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `torch.compile` wrap a module; other tests have it return the module itself."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
