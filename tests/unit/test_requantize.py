"""FP8 pairs that do not fit: refused by name, or converted when that is asked for, and measured."""

from __future__ import annotations

import math

import pytest
import torch

from fp8sync.errors import RecipeMismatch
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan, fill_buckets
from fp8sync.recipe import Encoding, Formula, Recipe
from fp8sync.wire.payload import PartReport, pack, unpack
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise

ROWS, COLS = 300, 200
BLOCKWISE = "float8_e4m3fn", Encoding.BLOCKWISE


def side(info: TensorInfo) -> Manifest:
    at = Placement("w", 0, (COLS, 1))
    scale_at = Placement("s", 0, (2, 1)) if info.encoding is Encoding.BLOCKWISE else None
    return Manifest.of([info], {0: [Box("a", (0, 0), (ROWS, COLS), at, scale_at)]})


def moved(
    wanted: TensorInfo, pair: dict[str, torch.Tensor], staging: dict[str, torch.Tensor]
) -> list[PartReport]:
    held = TensorInfo("a", (ROWS, COLS), *BLOCKWISE, Formula.FP32)
    plan = build_plan(side(held), side(wanted), requantize=True)
    reports = []
    for bucket in fill_buckets(plan.copies, 10_000):
        payload = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        reports += pack(bucket, pair, payload)
        unpack(bucket, payload, staging)
    return reports


@pytest.fixture
def pair() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    made = quantize_blockwise(torch.randn(ROWS, COLS), "fp32")
    return {"w": made.weight, "s": made.scale_inv}


def test_scales_of_another_formula_are_made_anew(pair: dict[str, torch.Tensor]) -> None:
    values = dequantize_blockwise(pair["w"], pair["s"], torch.float32)
    expected = quantize_blockwise(values, "pow2")
    staging = {name: torch.zeros_like(tensor) for name, tensor in pair.items()}
    reports = moved(TensorInfo("a", (ROWS, COLS), *BLOCKWISE, Formula.POW2), pair, staging)
    assert torch.equal(staging["w"].view(torch.uint8), expected.weight.view(torch.uint8))
    assert torch.equal(staging["s"], expected.scale_inv)
    error = math.sqrt(sum(r.error_sq for r in reports) / sum(r.norm_sq for r in reports))
    rounded = dequantize_blockwise(expected.weight, expected.scale_inv, torch.float32)
    assert error == pytest.approx(((rounded - values).norm() / values.norm()).item(), rel=1e-5)
    assert error > 0.01


def test_an_engine_without_fp8_gets_the_values(pair: dict[str, torch.Tensor]) -> None:
    staging = {"w": torch.zeros(ROWS, COLS, dtype=torch.bfloat16)}
    moved(TensorInfo("a", (ROWS, COLS), "bfloat16"), pair, staging)
    expected = dequantize_blockwise(pair["w"], pair["s"], torch.bfloat16)
    assert torch.equal(staging["w"], expected)


@pytest.mark.parametrize(
    "wanted",
    [
        TensorInfo("a", (ROWS, COLS), *BLOCKWISE, Formula.POW2),
        TensorInfo("a", (ROWS, COLS), "bfloat16"),
    ],
)
def test_nothing_is_converted_unasked(wanted: TensorInfo) -> None:
    held = TensorInfo("a", (ROWS, COLS), *BLOCKWISE, Formula.FP32)
    with pytest.raises(RecipeMismatch, match="on_format_mismatch='requantize'") as error:
        build_plan(side(held), side(wanted))
    (fault,) = error.value.violations
    pow2 = "an FP8 pair with pow2 scales"
    expected = pow2 if wanted.formula else "bfloat16"
    found = "an FP8 pair with fp32 scales"
    assert fault.startswith(f"a (trainer rank 0): expected {expected}, found {found}")


def test_a_recipe_says_what_is_allowed() -> None:
    assert not Recipe().requantizes
    allowed = Recipe("blockwise-pow2", on_format_mismatch="requantize")
    assert Recipe.from_json(allowed.to_json()) == allowed
    assert allowed.requantizes
    with pytest.raises(ValueError, match="unknown on_format_mismatch 'ask'"):
        Recipe(on_format_mismatch="ask")
