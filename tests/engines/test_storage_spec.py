"""The form of staged tensors, NaN for what only the engine's loader fills, and the memory reserved for them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from fp8sync.engines.vllm.compat import engine_commit
from fp8sync.engines.vllm.misc import unloaded
from fp8sync.engines.vllm.staging import reserved_bytes
from fp8sync.engines.vllm.storage import StorageSpec
from fp8sync.plan import DEFAULT_BUCKET_BYTES

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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "staged"),
        ({"fp8sync": {}}, "staged"),
        ({"fp8sync": {"commit": "in-place"}}, "in-place"),
        (object(), "staged"),  # vLLM takes any object that it can hash
    ],
)
def test_what_an_engine_was_made_for(given: object, expected: str) -> None:
    assert engine_commit(SimpleNamespace(additional_config=given)) == expected


def test_what_is_reserved_before_the_kv_cache() -> None:
    """All parameters for a staged commit; a bucket, or the largest module, for one in place."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 300), torch.nn.Linear(300, 128))
    record_metadata_for_reloading(model)
    weights = sum(4 * p.numel() for p in model.parameters())
    assert weights < reserved_bytes(model, "staged") < 1.01 * weights + (1 << 20) + 1024
    assert reserved_bytes(model, "in-place") == DEFAULT_BUCKET_BYTES
    with torch.device("meta"):
        model.append(torch.nn.Linear(1 << 15, 1 << 13, bias=False))
    record_metadata_for_reloading(model)
    assert reserved_bytes(model, "in-place") == 1 << 30
    with pytest.raises(ValueError, match="commit 'auto' of an engine; known: staged, in-place"):
        reserved_bytes(model, "auto")
