"""The form of staged tensors: NaN for what only the engine's loader knows to fill."""

from __future__ import annotations

import pytest
import torch

from fp8sync.engines.vllm.misc import unloaded
from fp8sync.engines.vllm.storage import StorageSpec

DTYPES = [torch.float8_e4m3fn, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_trainer_does_not_write_is_staged_as_nan(dtype: torch.dtype) -> None:
    spec = StorageSpec((4, 6), (6, 1), dtype, constants=((((3, 0), (1, 6)), 0.0),))
    poisoned = spec.poisoned([((0, 0), (2, 6)), ((2, 0), (1, 2))])
    found = poisoned.fill(torch.ones(4, 6).to(dtype)).float()
    assert torch.equal(found[:2], torch.ones(2, 6))
    assert torch.equal(found[2, :2], torch.ones(2))
    assert found[2, 2:].isnan().all()
    assert torch.equal(found[3], torch.zeros(6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_left_is_told(dtype: torch.dtype) -> None:
    model = torch.nn.Module()
    model.inner = torch.nn.Module()
    spec = StorageSpec((4,), (1,), dtype)
    for name, written in (("whole", 4), ("part", 3)):
        tensor = spec.poisoned([((0,), (written,))]).fill(torch.zeros(4).to(dtype))
        setattr(model.inner, name, torch.nn.Parameter(tensor, requires_grad=False))
    assert unloaded(model, {"inner.whole", "inner.part"}) == [
        "inner.part: 1 of 4 elements were filled by nothing"
    ]
