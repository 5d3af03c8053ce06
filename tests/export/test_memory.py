"""An export's memory is a few bands, however large a tensor is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from fp8sync.export.directory import DEFAULT_BAND_BYTES
from scripts.bench import export

ROOT = Path(__file__).resolve().parents[2]
ROWS, COLS = 16_384, 4_096
BAND = 1 << 20
BANDS = 40
"""What becomes of a band on its way, above all in float32, and what malloc keeps of it."""


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("bf16", "safetensors"),
        ("blockwise-pow2", "safetensors"),
        ("blockwise-fp32", "safetensors"),
        ("bf16", "torch_dist"),
        ("blockwise-pow2", "torch_dist"),
    ],
)
def test_memory_is_a_few_bands(recipe: str, kind: str, tmp_path: Path) -> None:
    weight = torch.randn(ROWS, COLS).bfloat16()  # 128 MiB
    if kind == "safetensors":
        save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    else:
        dcp.save({"a.weight": weight}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    command = [
        "-m",
        "tests.export.measure",
        str(tmp_path),
        str(tmp_path / "made"),
        recipe,
        str(BAND),
    ]
    ran = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    measured = json.loads(ran.stdout)
    assert measured["bytes"] >= ROWS * COLS
    assert 0 < measured["peak_bytes"] < BANDS * BAND < weight.nbytes / 2


def test_the_bench_holds_full_size_to_the_same_bands() -> None:
    assert export.LIMIT == BANDS * DEFAULT_BAND_BYTES
