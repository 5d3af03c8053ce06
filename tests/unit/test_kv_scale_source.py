"""KV-cache scales beside a trainer's weights."""

from __future__ import annotations

import pytest
import torch

import fp8sync
from fp8sync.sources.kv_scales import KvScaleSource

NAME = "layers.0.attn.k_scale"


def made(scales: dict[str, float | torch.Tensor], rank: int = 0) -> KvScaleSource:
    torch.manual_seed(0)
    return KvScaleSource(torch.nn.Linear(2, 2), scales, rank)


def test_values_are_read_anew_and_keep_their_place() -> None:
    scales: dict[str, float | torch.Tensor] = {NAME: 0.5}
    source = made(scales)
    assert source.manifest().tensors[NAME].shape == ()
    first = source.storages()[NAME]
    assert (first.item(), first.dtype) == (0.5, torch.float32)
    scales[NAME] = torch.tensor([0.25])
    second = source.storages()
    assert second[NAME].item() == 0.25
    assert second[NAME].data_ptr() == first.data_ptr()  # tables of addresses stay valid
    assert set(second) == {"weight", "bias", NAME}


def test_rank_0_sends_them() -> None:
    source = made({NAME: 0.5}, rank=1)
    assert set(source.manifest().tensors) == {"weight", "bias"}
    assert set(source.storages()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("value", "found"),
    [(0.0, "0.0"), (-1.0, "-1.0"), (float("nan"), "nan"), (torch.ones(2), r"\(2,\)")],
)
def test_what_is_no_scale_is_refused(value: float | torch.Tensor, found: str) -> None:
    with pytest.raises(fp8sync.TensorMismatch, match=f"{NAME}: expected one .*, found {found}"):
        made({NAME: value}).manifest()


def test_names_are_checked() -> None:
    with pytest.raises(fp8sync.TensorMismatch, match="weight: the trainer has a weight"):
        made({"weight": 1.0}).manifest()
    scales: dict[str, float | torch.Tensor] = {NAME: 0.5}
    source = made(scales)
    source.manifest()
    scales.clear()
    with pytest.raises(fp8sync.TensorMismatch, match=f"{NAME}: expected a scale, found none"):
        source.storages()
