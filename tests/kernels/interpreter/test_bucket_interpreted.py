"""The grouped kernel under Triton's interpreter, against its reference, byte for byte."""

from __future__ import annotations

import pytest
import torch

from fp8sync_kernels.descriptor import Path
from fp8sync_kernels.formulas import FORMULAS
from fp8sync_kernels.job import Part, canonical_digest, cast, copy, partial_amax, quantize
from fp8sync_kernels.table import build_table
from tests.kernels.cases import FLOATS, all_bf16_patterns, check, hard, with_nonfinite

WHOLE = Part()


def quantized(arena, x, formula, part=WHOLE, **given):
    rows, cols = x.shape
    origin = given.get("origin", (0, 0))
    grid = (-(-(origin[0] + rows) // 128), -(-(origin[1] + cols) // 128))
    weight = arena.output(rows, cols)
    scale_inv = arena.output(*grid, torch.float32)
    return quantize(arena.input(x), formula, weight, scale_inv, part, **given)


def test_cast_patch():
    """The conversions that the interpreter gets wrong by itself."""
    import triton
    import triton.language as tl

    from tests.kernels.interpreter.cast_kernel import cast_kernel

    x = torch.tensor([1.96875, 1.0625, 464.0, 1e9, float("nan"), -float("nan"), 31.9, 2e-10])
    codes = torch.zeros(8, dtype=torch.uint8)
    cast_kernel[(1,)](x, codes, 8)
    assert triton.__version__
    assert tl.float8e4nv
    assert codes.tolist() == [0x40, 0x38, 0x7E, 0x7E, 0x7F, 0x7F, 0x60, 0x00]


@pytest.mark.parametrize("formula", FORMULAS)
def test_every_bf16_pattern(formula):
    check(lambda arena: [quantized(arena, all_bf16_patterns(), formula)])


@pytest.mark.parametrize("formula", FORMULAS)
def test_every_finite_bf16_pattern(formula):
    x = all_bf16_patterns()
    x = torch.where(x.isfinite(), x, torch.zeros_like(x))
    # Sorted by magnitude, so that the scales of blocks take many values.
    x = x.flatten()[x.flatten().abs().float().argsort()].view(256, 256)
    _, _, nonfinite = check(lambda arena: [quantized(arena, x, formula)])
    assert nonfinite[0] == 0


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(128, 128), (200, 304), (130, 77), (1, 16), (3, 1)])
def test_shapes(shape, dtype, formula):
    check(lambda arena: [quantized(arena, hard(*shape, dtype), formula)])


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nonfinite_is_counted(dtype, formula):
    x = with_nonfinite(hard(140, 272, dtype))
    _, _, nonfinite = check(lambda arena: [quantized(arena, x, formula, Part(slot=3))])
    assert nonfinite.tolist() == [0, 0, 0, 4, 0, 0, 0, 0]


def test_a_bucket_of_everything():
    """One launch: several dtypes, formulas, strides and slots, copies, casts, digests."""

    wide = hard(300, 400, torch.bfloat16)
    codes = torch.randint(0, 256, (70, 200), dtype=torch.uint8)

    def jobs(arena):
        return [
            quantized(arena, wide[:, :256], "pow2", Part(slot=0)),
            quantized(arena, wide[5:, 48:200], "fp32", Part(slot=1)),
            quantized(arena, hard(64, 64, torch.float32), "fp32", Part(slot=2)),
            quantize(
                arena.input(wide[:128, 1:130]),
                "pow2",
                arena.output(128, 129, stride=200),
                None,
                Part(slot=3, base=7, pitch=301),
            ),
            copy(arena.input(codes), arena.output(70, 200, stride=224), Part(slot=4)),
            copy(arena.input(codes[:, 3:50]), arena.output(70, 47, stride=51), Part(slot=5)),
            copy(arena.input(codes), None, Part(slot=6)),
            copy(arena.input(wide[0]), arena.output(1, 400, torch.bfloat16), Part(slot=6)),
            cast(arena.input(wide[1]), arena.output(1, 400, torch.float32), Part(slot=7, base=16)),
        ]

    check(jobs)


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_casts(source, target):
    x = hard(17, 300, source)
    check(lambda arena: [cast(arena.input(x), arena.output(17, 300, target, stride=320))])


@pytest.mark.parametrize(
    ("shape", "stride", "path"),
    [
        ((33, 1040), 2048, Path.COPY_16),
        ((3, 5000), 5000, Path.COPY_16),
        ((33, 36), 40, Path.COPY_4),
        ((5, 31), 33, Path.COPY_1),
    ],
)
def test_copies_and_digests(shape, stride, path):
    rows, cols = shape
    x = torch.randint(0, 256, (rows, stride), dtype=torch.uint8)[:, :cols]

    def jobs(arena):
        listed = [
            copy(arena.input(x), arena.output(rows, cols, stride=stride), Part(slot=0)),
            copy(arena.input(x), None, Part(slot=1)),
        ]
        assert build_table(listed, "cpu").paths & path
        return listed

    _, digests, _ = check(jobs)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("cut", [(64, 48), (100, 33), (130, 0)])
def test_blocks_cut_between_holders(cut, formula):
    """Partial amax of both pieces, their maximum, and then the bytes of the uncut matrix."""
    from fp8sync_kernels import quantize_blockwise

    x = hard(260, 200)
    row, _ = cut
    whole = quantize_blockwise(x, formula)
    pieces = [(x[:row], (0, 0)), (x[row:], (row % 128, 0))]

    def amaxes(arena):
        return [
            partial_amax(
                arena.input(piece),
                arena.output(-(-(origin[0] + piece.shape[0]) // 128), 2, torch.float32),
                origin=origin,
            )
            for piece, origin in pieces
        ]

    memories, _, _ = check(amaxes)
    parts = [memory[:-64].view(torch.float32).view(-1, 2) for memory in memories]
    full = torch.zeros(3, 2)
    full[: parts[0].shape[0]] = parts[0]
    start = row // 128
    full[start:] = torch.maximum(full[start:], parts[1])
    given = [full[: parts[0].shape[0]].clone(), full[start:].clone()]

    def codes(arena):
        return [
            quantized(
                arena, piece, formula, Part(base=at * 200), amax=arena.input(amax), origin=origin
            )
            for (piece, origin), amax, at in zip(pieces, given, (0, row), strict=True)
        ]

    memories, _, _ = check(codes)
    joined = torch.cat([memories[0][: row * 200], memories[2][: (260 - row) * 200]])
    assert torch.equal(joined, whole.weight.view(torch.uint8).flatten())


def test_canonical_digest_survives_reencoding():
    from fp8sync_kernels import quantize_blockwise
    from fp8sync_kernels.reference.canonical import canonical_pair

    x = hard(256, 384)
    x[:128, :128] = x[:128, :128].clamp(-230, 230)
    x[0, 0] = 230  # quantizes to 224 of scale_inv 1: vLLM would halve the scale
    sent = quantize_blockwise(x, "pow2")
    live_weight, live_scale = canonical_pair(sent.weight, sent.scale_inv)
    assert not torch.equal(live_scale, sent.scale_inv)

    def jobs(arena):
        weights = (sent.weight.view(torch.uint8), live_weight)
        return [
            canonical_digest(arena.input(w), arena.input(s), Part(slot=slot))
            for slot, (w, s) in enumerate(zip(weights, (sent.scale_inv, live_scale), strict=True))
        ]

    _, digests, _ = check(jobs)
    assert digests[0] == digests[1] != 0


def test_canonical_leaves_other_scales_alone():
    from fp8sync_kernels import digest, quantize_blockwise

    weight, scale_inv, _ = quantize_blockwise(hard(100, 130), "fp32")
    keep = (scale_inv.view(torch.int32) & 0x7FFFFF) != 0
    assert keep.any()
    packed = torch.zeros(-(-13000 // 16) * 16 + 8, dtype=torch.uint8)
    packed[:13000] = weight.view(torch.uint8).flatten()
    packed[-8:] = scale_inv.view(torch.uint8).flatten()
    _, digests, _ = check(
        lambda arena: [canonical_digest(arena.input(weight), arena.input(scale_inv))]
    )
    if keep.all():
        assert digests[0].item() % (1 << 64) == digest(packed)


@pytest.mark.parametrize("cols", [144, 131])
def test_canonical_of_any_bytes(cols):
    """All codes, NaN of both signs included, under scales that are and are not powers of two."""
    weight = torch.randint(0, 256, (200, cols), dtype=torch.uint8)
    weight[:128, :128] = weight[:128, :128].clamp(max=0x70)
    scale_inv = torch.tensor([[2.0**-9, 2.0**100], [0.37, -1.0]])
    check(lambda arena: [canonical_digest(arena.input(weight), arena.input(scale_inv))])
