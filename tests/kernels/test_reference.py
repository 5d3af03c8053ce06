"""The PyTorch references against independent, slow statements of the same rules."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8sync_kernels import dequantize_blockwise, digest, quantize_blockwise
from fp8sync_kernels.reference.blockwise import scales_from_amax
from fp8sync_kernels.reference.canonical import canonical_pair
from fp8sync_kernels.reference.digest import digest_rows, key
from tests.kernels.cases import all_bf16_patterns, hard, with_nonfinite

GOLDEN_KEYS = [0x5D139822, 0xD4FA0C2C, 0xEF5FD85]
GOLDEN_DIGEST = 0x6F063CD61D4C7D8
SLOW = settings(max_examples=25, deadline=None)


def digest_by_definition(data, base=0):
    return (
        sum((b << 8 * ((base + i) % 4)) * key((base + i) // 4) for i, b in enumerate(data)) % 2**64
    )


@SLOW
@given(st.binary(max_size=70), st.integers(0, 1 << 36))
def test_digest_is_its_definition(data, base):
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0).byte()
    assert digest(tensor, base) == digest_by_definition(data, base)


def test_golden_digests():
    """Frozen: a change here breaks the wire format."""
    assert [key(i) for i in range(3)] == GOLDEN_KEYS
    assert digest(torch.arange(11, dtype=torch.uint8)) == GOLDEN_DIGEST
    assert digest(torch.zeros(9, dtype=torch.uint8)) == 0


@SLOW
@given(st.integers(0, 300_000), st.integers(0, 300_000))
def test_digests_of_pieces_add_up(size, cut):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    cut = min(cut, size)
    assert digest(data) == (digest(data[:cut]) + digest(data[cut:], cut)) % 2**64


def test_digest_sees_swaps_and_changes():
    data = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    seen = digest(data)
    for i, j in ((0, 128), (1000, 1004), (0, 4092)):
        swapped = data.clone()
        swapped[i : i + 4], swapped[j : j + 4] = data[j : j + 4].clone(), data[i : i + 4].clone()
        assert (digest(swapped) == seen) == torch.equal(swapped, data)
    blocks = torch.cat([data[2048:], data[:2048]])
    assert digest(blocks) != seen


def test_digest_of_rows_apart():
    matrix = torch.randint(0, 256, (5, 7), dtype=torch.uint8)
    spaced = torch.zeros(5 * 11 + 3, dtype=torch.uint8)
    for i in range(5):
        spaced[3 + 11 * i : 10 + 11 * i] = matrix[i]
    assert digest_rows(matrix, 3, 11) == digest(spaced)


def slow_block(values, formula, largest):
    """One block by float64 and integers: (codes as values, scale_inv)."""
    amax = max(abs(v) for v in values)
    if formula == "pow2":
        scale_inv = 2.0 ** math.ceil(math.log2(max(amax, float(torch.tensor(1e-4))) / 448))
        multiplier = 1 / scale_inv
    elif amax == 0:
        multiplier = scale_inv = 1.0
    else:
        # Rounding a float64 quotient of fp32 numbers to fp32 is the correctly rounded quotient.
        multiplier = float(torch.tensor(448.0 / amax, dtype=torch.float64).float())
        multiplier = min(multiplier, largest)
        scale_inv = float(torch.tensor(1.0 / multiplier, dtype=torch.float64).float())
    return multiplier, scale_inv


@SLOW
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.sampled_from(["pow2", "fp32"]),
)
def test_scales_by_float64(values, formula):
    x = torch.tensor([values], dtype=torch.float32)
    got = quantize_blockwise(x, formula)
    multiplier, scale_inv = slow_block(x[0].tolist(), formula, torch.finfo(torch.float32).max)
    assert got.scale_inv.item() == scale_inv
    scaled = (x.double() * multiplier).float()
    expected = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(got.weight.float(), expected)


def test_pow2_scales_of_every_bf16_amax():
    """The least power of two by which amax fits into 448, and no less than that of 1e-4."""
    amax = positive_bf16_patterns()
    multiplier, scale_inv = scales_from_amax(amax, "pow2", torch.bfloat16)
    assert (scale_inv.double().frexp().mantissa == 0.5).all()
    assert (scale_inv.double() * multiplier == 1).all()
    wanted = amax.clamp(min=torch.tensor(1e-4).item()).double()
    assert (wanted <= 448 * scale_inv.double()).all()
    assert (wanted > 224 * scale_inv.double()).all()


def test_fp32_scales_of_every_bf16_amax():
    """Rounding a float64 quotient of fp32 numbers to fp32 is the correctly rounded quotient."""
    amax = positive_bf16_patterns()
    multiplier, scale_inv = scales_from_amax(amax, "fp32", torch.bfloat16)
    quotient = (torch.tensor(448.0, dtype=torch.float64) / amax.double()).float()
    expected = quotient.clamp(max=torch.finfo(torch.bfloat16).max)
    assert torch.equal(multiplier, expected)
    one = torch.tensor(1.0, dtype=torch.float64)
    assert torch.equal(scale_inv, (one / expected.double()).float())


def positive_bf16_patterns():
    """float32 ``[32639]``: all finite bf16 above zero."""
    return torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).float()


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_error_is_bounded(formula):
    x = hard(300, 270)
    weight, scale_inv, nonfinite = quantize_blockwise(x, formula)
    error = (dequantize_blockwise(weight, scale_inv, torch.float32) - x.float()).abs()
    # Half of the widest spacing of codes, which is 32.
    bound = 16 * scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :270]
    assert (error <= bound * (1 + 1e-5)).all()
    assert nonfinite == 0


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_strides_do_not_matter(formula):
    x = hard(400, 300)
    view = x.T[3:203:2, 5:400]
    one, other = quantize_blockwise(view, formula), quantize_blockwise(view.contiguous(), formula)
    assert torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))
    assert torch.equal(one.scale_inv, other.scale_inv)


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_nonfinite_blocks(formula):
    x = with_nonfinite(torch.randn(256, 256).bfloat16())
    weight, scale_inv, nonfinite = quantize_blockwise(x, formula)
    assert nonfinite == 4
    codes = weight.view(torch.uint8)
    assert codes[0, 0] == 0x7F
    assert codes[128, 128] == 0x7F
    assert codes[-1, -1] == 0x7E
    assert codes[-1, 0] == 0xFE
    assert scale_inv[0, 0] == scale_inv[1, 0] == scale_inv[1, 1] == 1
    assert scale_inv[0, 1] != 1
    assert (quantize_blockwise(all_bf16_patterns(), formula).nonfinite) == 256


def test_zero_blocks():
    x = torch.zeros(2, 3)
    assert quantize_blockwise(x, "pow2").scale_inv.item() == 2.0**-22
    assert quantize_blockwise(x, "fp32").scale_inv.item() == 1


def test_tiny_fp32_blocks_follow_transformer_engine():
    x = torch.full((1, 1), 1e-38)
    largest = torch.finfo(torch.bfloat16).max
    got = quantize_blockwise(x.bfloat16(), "fp32")
    assert got.scale_inv.item() == float(torch.tensor(1 / largest, dtype=torch.float64).float())


def test_canonical_form():
    x = hard(256, 256)
    pair = quantize_blockwise(x, "pow2")
    weight, scale_inv = canonical_pair(pair.weight, pair.scale_inv)
    values = dequantize_blockwise(pair.weight, pair.scale_inv, torch.float32)
    again = dequantize_blockwise(weight.view(torch.float8_e4m3fn), scale_inv, torch.float32)
    assert torch.equal(values, again)
    twice = canonical_pair(weight, scale_inv)
    assert torch.equal(twice[0], weight)
    assert torch.equal(twice[1], scale_inv)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="formula 'e8m0' is not one of pow2, fp32"):
        quantize_blockwise(torch.zeros(2, 2), "e8m0")
    with pytest.raises(TypeError, match="2-D"):
        quantize_blockwise(torch.zeros(2), "pow2")
    with pytest.raises(
        TypeError, match=r"2-D tensor of bfloat16, float16, float32, got 2-D .*float8"
    ):
        quantize_blockwise(torch.zeros(2, 2).to(torch.float8_e4m3fn), "pow2")
    with pytest.raises(TypeError, match=r"2-D tensor of float8_e4m3fn, got 2-D .*float32"):
        dequantize_blockwise(torch.zeros(2, 2), torch.ones(1, 1), torch.half)
    with pytest.raises(ValueError, match="outside"):
        quantize_blockwise(torch.zeros(2, 2), "pow2", origin=(128, 0))
    with pytest.raises(ValueError, match="needs"):
        dequantize_blockwise(
            torch.zeros(2, 2).to(torch.float8_e4m3fn), torch.ones(2, 2), torch.half
        )


def test_import_needs_no_triton():
    """PyTorch may have imported it; what is imported here adds nothing."""
    code = "import sys, torch; before = 'triton' in sys.modules; import fp8sync_kernels; "
    code += "assert ('triton' in sys.modules) == before; "
    code += "assert not any(m.startswith('fp8sync_kernels.gpu') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
