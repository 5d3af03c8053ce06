"""Our bytes beside those of the libraries that make or use them, on a GPU that has them."""

from __future__ import annotations

import pytest
import torch

from fp8sync_kernels import dequantize_blockwise, quantize_blockwise
from scripts.bench import kernel_peers
from tests.kernels.cases import Arena, run_table
from tests.kernels.scenarios import one

pytestmark = pytest.mark.gpu


def weights(rows=1024, cols=2048):
    """Blocks of many scales, none below amax 1e-4."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, cols, generator=generator)
    scale = torch.exp2(torch.rand(rows // 128, cols // 128, generator=generator) * 12 - 9)
    return (x * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)).bfloat16()


def by_kernel(x, formula):
    from fp8sync_kernels import build_table

    arena = Arena("cuda")
    table = build_table(one(arena, x, formula), "cuda")
    counters = torch.zeros(2, 8, dtype=torch.int64, device="cuda")
    run_table(table, counters[0], counters[1])
    size = x.numel()
    weight = arena.written[0][:size].view(x.shape)
    grid = (-(-x.shape[0] // 128), -(-x.shape[1] // 128))
    return weight, arena.written[1][: grid[0] * grid[1] * 4].view(torch.float32).view(grid)


def peer(name, x, formula):
    try:
        return kernel_peers.PEERS[name](x.cuda(), formula == "pow2")
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("transformer-engine", "pow2"),
        ("transformer-engine", "fp32"),
        ("deepgemm-torch", "pow2"),
        ("vllm-torch", "pow2"),
    ],
)
def test_same_bytes(name, formula):
    x = weights()
    codes, scale_inv = peer(name, x, formula)
    weight, ours = by_kernel(x, formula)
    assert torch.equal(scale_inv, ours)
    assert torch.equal(codes.view(torch.uint8), weight)


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_deep_gemm_multiplies_what_we_quantized(formula):
    deep_gemm = pytest.importorskip("vllm.third_party.deep_gemm")
    from vllm.third_party.deep_gemm.utils.math import per_token_cast_to_fp8

    generator = torch.Generator().manual_seed(6)
    a = torch.randn(256, 2048, generator=generator).bfloat16().cuda()
    weight, scale_inv = by_kernel(weights(1024, 2048), formula)
    a_codes, a_scale = per_token_cast_to_fp8(a, use_ue8m0=formula == "pow2")
    out = torch.empty(256, 1024, dtype=torch.bfloat16, device="cuda")
    b = (weight.view(torch.float8_e4m3fn), scale_inv)
    deep_gemm.fp8_gemm_nt((a_codes, a_scale), b, out, disable_ue8m0_cast=formula != "pow2")
    a_exact = a_codes.double() * a_scale.double().repeat_interleave(128, 1)
    exact = a_exact @ dequantize_blockwise(*b, torch.float32).double().T
    error = ((out.double() - exact).norm() / exact.norm()).item()
    print(f"relative error of the bf16 product, {formula}: {error:.2e}")
    # Rounding the result to bf16 alone makes 1.7e-3.
    assert error < 4e-3


def test_reference_agrees_with_the_kernel_on_cuda():
    x = weights()
    for formula in ("pow2", "fp32"):
        on_cuda = quantize_blockwise(x.cuda(), formula)
        weight, scale_inv = by_kernel(x, formula)
        assert torch.equal(on_cuda.weight.view(torch.uint8), weight)
        assert torch.equal(on_cuda.scale_inv, scale_inv)
