"""Directories that cannot be read are refused by name, every fault at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from fp8sync.errors import UnsupportedLayout
from fp8sync.sources import CheckpointSource, as_source

if TYPE_CHECKING:
    from pathlib import Path

CODES = torch.zeros(256, 128).to(torch.float8_e4m3fn)


def test_every_fault_of_the_pairs_is_named(tmp_path: Path) -> None:
    tensors = {
        "none.weight": CODES,
        "shape.weight": CODES,
        "shape.weight_scale_inv": torch.ones(2, 2),
        "alone.weight_scale_inv": torch.ones(2, 1),
        "per_tensor.weight": CODES,
        "per_tensor.weight_scale": torch.ones(1),
        "e5m2.weight": CODES.to(torch.float8_e5m2),
        "good.weight": CODES,
        "good.weight_scale_inv": torch.ones(2, 1),
    }
    save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedLayout) as error:
        as_source(tmp_path).manifest()
    grid = "expected scale_inv [2, 1] of 128x128 blocks, found"
    assert sorted(error.value.violations) == [
        "alone.weight_scale_inv: expected an FP8 weight, found none",
        "e5m2.weight: dtype float8_e5m2 cannot travel",
        f"none.weight: {grid} none",
        f"per_tensor.weight: {grid} none",
        f"shape.weight: {grid} [2, 2]",
    ]


def test_an_index_that_lies(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(UnsupportedLayout) as error:
        CheckpointSource(tmp_path)
    assert error.value.violations == ("b: expected in one.safetensors, found none",)
    index.write_text(json.dumps({"weight_map": {"a": "two.safetensors"}}))
    with pytest.raises(UnsupportedLayout, match=r"two\.safetensors cannot be read"):
        CheckpointSource(tmp_path)
    for broken in ("{}", "{", "[1]", '{"weight_map": 3}'):
        index.write_text(broken)
        with pytest.raises(
            UnsupportedLayout, match=r"index\.json: expected JSON with a weight_map"
        ):
            CheckpointSource(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    """As when shards were written beside a whole file, or beside those of another step."""
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(UnsupportedLayout, match="expected every tensor in one file") as error:
        CheckpointSource(tmp_path)
    fault = "b: found in model-00002-of-00002.safetensors and in model.safetensors"
    assert error.value.violations == (fault,)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayout, match=r"expected \*\.safetensors, found none"):
        CheckpointSource(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(UnsupportedLayout, match="cannot be read"):
        CheckpointSource(tmp_path)
