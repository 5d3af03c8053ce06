"""Ranks that share a model write it together; what stops one of them, all raise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fp8sync_kernels import quantize_blockwise
from tests.export.checkpoints import LINEAR, SCALES, assert_same, read
from tests.export.fsdp_ranks import RECIPES
from tests.megatron import models

ROOT = Path(__file__).resolve().parents[2]
RANKS = 3  # shards of 512 rows that are not multiples of 128


@pytest.fixture(scope="module", params=["qwen3", "qwen3-moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fsdp")
    models.write_checkpoint(request.param, made / "saved")
    command = [sys.executable, "-m", "tests.export.fsdp_ranks"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(RANKS), str(made)], cwd=ROOT)
        for rank in range(RANKS)
    ]
    try:
        assert [process.wait(500) for process in ranks] == [0] * RANKS
    finally:
        for process in ranks:
            process.kill()
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_shards_become_the_checkpoint(folder: Path, recipe: str) -> None:
    expected = read(folder / "saved")
    if recipe != "bf16":
        for name in [name for name in expected if name.endswith(LINEAR)]:
            q = quantize_blockwise(expected[name], recipe.removeprefix("blockwise-"))
            expected[name], expected[name + SCALES] = q.weight, q.scale_inv
    assert_same(read(folder / recipe), expected)


def test_every_rank_hears_of_a_fault(folder: Path) -> None:
    told = {(folder / f"{rank}.txt").read_text() for rank in range(RANKS)}
    assert len(told) == 1
    assert "NonFiniteWeight" in (text := told.pop())
    # All its rows are one band, which all ranks sent.
    name = "model.layers.0.self_attn.o_proj.weight (trainer ranks 0, 1, 2)"
    assert f"{name}: expected finite values, found 1 NaN or Inf" in text
    assert not list((folder / "bad").iterdir())
