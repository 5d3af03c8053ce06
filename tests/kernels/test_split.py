"""Splitting FP8 pairs: exact where aligned, a named refusal where not."""

from __future__ import annotations

import pytest
import torch

from fp8sync_kernels import dequantize_blockwise, quantize_blockwise
from fp8sync_kernels.requantize import requantize
from fp8sync_kernels.split import (
    MisalignedCutError,
    Pair,
    shard_pair,
    slice_pair,
    split_experts,
    split_gate_up,
    split_qkv,
)
from tests.kernels.cases import hard


def pair_of(x, formula="pow2"):
    return Pair(*quantize_blockwise(x, formula)[:2])


def same(one, other):
    return torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8)) and (
        torch.equal(one.scale_inv, other.scale_inv)
    )


def fused_qkv(q, k, v, groups, z=None):
    """Megatron's layout from heads stored one kind after another."""
    sections = [t.chunk(groups) for t in ((q, z, k, v) if z is not None else (q, k, v))]
    return torch.cat([piece for group in zip(*sections, strict=True) for piece in group])


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("head_dim", "heads", "groups"), [(128, 4, 2), (256, 2, 1)])
def test_qkv(head_dim, heads, groups, gate, formula):
    q, z = (hard(heads * head_dim, 200, seed=seed) for seed in (1, 4))
    k, v = (hard(groups * head_dim, 200, seed=seed) for seed in (2, 3))
    fused = pair_of(fused_qkv(q, k, v, groups, z if gate else None), formula)
    parts = split_qkv(fused, query_heads=heads, groups=groups, head_dim=head_dim, output_gate=gate)
    expected = {"q": q, "k": k, "v": v, **({"z": z} if gate else {})}
    assert parts.keys() == expected.keys()
    for name, x in expected.items():
        assert same(parts[name], pair_of(x, formula)), name


@pytest.mark.parametrize(("head_dim", "row"), [(64, 192), (80, 240), (96, 288), (192, 576)])
def test_qkv_refuses_heads_that_straddle_blocks(head_dim, row):
    fused = pair_of(hard(5 * head_dim, 128))
    with pytest.raises(MisalignedCutError, match=rf"q of query group 0 .* row {row},"):
        split_qkv(fused, query_heads=3, groups=1, head_dim=head_dim)


def test_qkv_of_other_numbers():
    with pytest.raises(ValueError, match="make 1280, the weight has 1024"):
        split_qkv(pair_of(hard(1024, 128)), query_heads=6, groups=2, head_dim=128)


def test_gate_up():
    x = hard(512, 300)
    gate, up = split_gate_up(pair_of(x))
    assert same(gate, pair_of(x[:256]))
    assert same(up, pair_of(x[256:]))


def test_gate_up_of_a_stack_of_experts():
    pairs = [pair_of(hard(256, 130, seed=seed)) for seed in range(3)]
    stack = Pair(*(torch.stack(tensors) for tensors in zip(*pairs, strict=True)))
    gate, up = map(split_experts, split_gate_up(stack))
    for pair, *halves in zip(pairs, gate, up, strict=True):
        assert all(map(same, halves, split_gate_up(pair)))


@pytest.mark.parametrize("half", [64, 192])
def test_gate_up_refuses_what_chunk_would_cut_wrongly(half):
    with pytest.raises(MisalignedCutError, match=f"gate is cut at row {half}"):
        split_gate_up(pair_of(hard(2 * half, 128)))


@pytest.mark.parametrize("dim", [-2, -1])
def test_shards(dim):
    x = hard(512, 512)
    pieces = [shard_pair(pair_of(x), dim, rank, 2) for rank in range(2)]
    for piece, part in zip(pieces, x.chunk(2, dim=dim), strict=True):
        assert same(piece, pair_of(part.contiguous()))
    kind = "row" if dim == -2 else "column"
    with pytest.raises(MisalignedCutError, match=f"shard 0 of 2 is cut at {kind} 192"):
        shard_pair(pair_of(hard(384, 384)), dim, 0, 2)


@pytest.mark.parametrize(
    ("dim", "rank", "world_size", "found"),
    [
        (0, 0, 2, "dim 0 has no blocks"),
        (3, 0, 2, "dim 3 has no blocks"),
        (-1, 2, 2, "no rank 2 of 2"),
        (-1, -1, 2, "no rank -1 of 2"),
        (-1, 0, 0, "no rank 0 of 0"),
        (-1, 0, 3, "a dim of 512 does not divide among 3 ranks"),
    ],
)
def test_shards_that_there_are_not(dim, rank, world_size, found):
    with pytest.raises(ValueError, match=found):
        shard_pair(Pair(torch.zeros(512, 512), torch.ones(4, 4)), dim, rank, world_size)


def test_a_ragged_end_is_no_cut():
    x = hard(300, 130)
    assert same(slice_pair(pair_of(x), -2, 256, 300), pair_of(x[256:]))


def test_slices_are_views():
    pair = pair_of(hard(256, 256))
    piece = slice_pair(pair, -2, 128, 256)
    assert piece.weight.untyped_storage().data_ptr() == pair.weight.untyped_storage().data_ptr()


def test_experts():
    pairs = [pair_of(hard(256, 130, seed=seed)) for seed in range(3)]
    weight = torch.stack([pair.weight.view(torch.uint8) for pair in pairs])
    stack = Pair(weight.view(torch.float8_e4m3fn), torch.stack([p.scale_inv for p in pairs]))
    assert all(map(same, split_experts(stack), pairs))
    with pytest.raises(ValueError, match="not a stack of experts"):
        split_experts(Pair(stack.weight, stack.scale_inv[:, :1]))


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_requantize_measures_its_error(formula):
    """Rows de-interleaved inside blocks: nearly lossless for pow2, a second rounding for fp32."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[64:128] *= 8
    pair = pair_of(x, formula)
    rows = torch.cat([torch.arange(0, 64), torch.arange(128, 192), torch.arange(64, 128)])
    result = requantize(pair, rows, formula)
    before = dequantize_blockwise(*pair, torch.float32)[rows]
    after = dequantize_blockwise(*result.pair, torch.float32)
    assert result.max_error == (before - after).abs().max()
    assert result.changed == (before != after).double().mean()
    assert (result.changed < 1e-3) if formula == "pow2" else (result.changed > 0.05)
    assert result.relative_rms_error < 0.03


def test_requantize_of_aligned_pow2_changes_nothing():
    pair = pair_of(hard(256, 256).clamp(-1e3, 1e3))
    result = requantize(pair, torch.arange(128, 256), "pow2")
    assert result.max_error == 0


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_requantize_makes_the_shards_that_no_slice_can(formula):
    """Both halves of 384 columns, cut inside a block."""
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(2)).bfloat16()
    pair, rows = pair_of(x, formula), torch.arange(256)
    values = dequantize_blockwise(*pair, torch.float32)
    for start, stop in ((0, 192), (192, 384)):
        with pytest.raises(MisalignedCutError, match="cut at column 192"):
            slice_pair(pair, -1, start, stop)
        result = requantize(pair, rows, formula, cols=(start, stop))
        assert same(result.pair, pair_of(values[:, start:stop], formula))
        after = dequantize_blockwise(*result.pair, torch.float32)
        lost = (after - values[:, start:stop]).double()
        assert result.max_error == lost.abs().max()
        expected = (lost.norm() / values[:, start:stop].double().norm()).item()
        assert result.relative_rms_error == pytest.approx(expected, rel=1e-12)
    for cols in ((-1, 192), (0, 385), (200, 100)):
        with pytest.raises(ValueError, match="of 384"):
            requantize(pair, rows, formula, cols=cols)


def test_requantize_refuses_what_would_cost_a_block_its_values():
    """Blocks with NaN have scale_inv 1, under which small values are zeros: an error to measure that is not."""
    weight, scale_inv = pair_of(torch.full((256, 128), 1e-3))
    weight.view(torch.uint8)[200, 5] = 0xFF
    with pytest.raises(ValueError, match="1 values of 16384 are not finite"):
        requantize(Pair(weight, scale_inv), torch.arange(100, 228), "pow2")
    kept = requantize(Pair(weight, scale_inv), torch.arange(0, 128), "pow2")
    assert kept.max_error == 0
    with pytest.raises(ValueError, match="65536 values of 65536 are not finite"):
        requantize(
            Pair(torch.full((256, 256), 0x38).byte(), torch.full((2, 2), torch.inf)),
            torch.arange(256),
            "pow2",
        )


def test_requantize_of_nothing():
    none = requantize(pair_of(hard(256, 128)), torch.arange(0), "pow2")
    assert none[1:] == (0.0, 0.0, 0.0)
    assert none.pair.weight.shape == (0, 128)


@pytest.mark.parametrize("rows", [3, 5])
def test_scales_that_do_not_fit(rows):
    pair = Pair(torch.zeros(512, 128), torch.ones(rows, 1))
    with pytest.raises(ValueError, match=f"with 4 blocks in dim -2, found {rows}"):
        slice_pair(pair, -2, 0, 256)
    codes = Pair(pair.weight.to(torch.float8_e4m3fn), pair.scale_inv)
    with pytest.raises(ValueError, match=rf"shape \({rows}, 1\), .* needs \(4, 1\)"):
        requantize(codes, torch.arange(256), "pow2")
