"""What holds for any rectangle: tests that the interpreter's folder and the GPU's file both collect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8sync_kernels import quantize_blockwise
from fp8sync_kernels.descriptor import Path
from fp8sync_kernels.formulas import FORMULAS
from fp8sync_kernels.job import Part, canonical_digest, cast, copy, copy_codes, partial_amax
from fp8sync_kernels.reference.canonical import canonical_pair
from fp8sync_kernels.table import build_table
from tests.kernels.cases import DEVICE, FLOATS, KERNEL, check, hard, run
from tests.kernels.scenarios import quantized, random_bytes

__all__ = [
    "test_any_canonical_digest",
    "test_any_cast",
    "test_any_move",
    "test_any_origin",
    "test_any_rectangle",
    "test_blocks_cut_between_holders",
    "test_canonical_digest_survives_reencoding",
    "test_casts_count_nan",
]


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(1, 140), st.integers(1, 150)),
    st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 8, 16, 33])),
    st.sampled_from(FLOATS),
    st.sampled_from(FORMULAS),
    st.sampled_from([1.0, 0.0, -0.0, 1e-30, 1e-5, 1e30, 1e-39, 1e-44, float("nan"), float("inf")]),
    st.sampled_from([1, 3]),
    st.integers(0, 40),
    st.booleans(),
)
def test_any_rectangle(shape, start, dtype, formula, factor, every, base, aligned):
    """A rectangle of a larger tensor into others, of any alignment, magnitude and digest position."""
    multiple, gap = (16, 16) if aligned else (1, 7)
    rows, (cols, left) = shape[0], (-(-n // multiple) * multiple for n in (shape[1], start[1]))
    whole = torch.randn(
        start[0] + rows, left + cols + gap, generator=torch.Generator().manual_seed(rows + cols)
    )
    whole[::every, ::every] *= factor
    x = whole.to(dtype)[start[0] :, left : left + cols]
    base = base // multiple * 4
    part = Part(1, base, pitch=cols + gap, scale_base=40_000, scale_pitch=4 * gap)

    def jobs(arena):
        made = [quantized(arena, x, formula, part, gap)]
        wide = Path.WIDE_BF16 | Path.WIDE_FP16 | Path.WIDE_FP32
        assert bool(build_table(made, "cpu").paths & wide) or not aligned
        return made

    check(jobs)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.sampled_from([1, 4, 16, 33, 260, 1040])),
    st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 4, 16])),
    st.sampled_from([0, 3, 8, 16]),
    st.sampled_from([0, 5, 16, 4096]),
    st.sampled_from([(copy, torch.uint8), (copy_codes, torch.uint8), *((cast, d) for d in FLOATS)]),
)
def test_any_move(shape, start, gap, base, kind):
    """Rectangles out of and into larger ones; half of the rows are of the largest exponents, or NaN."""
    move, dtype = kind
    rows, cols = shape
    width = start[1] + cols + gap
    x = random_bytes(start[0] + rows, width * dtype.itemsize)
    x[::2] |= 0x7F
    x = x.view(dtype)[start[0] :, start[1] : start[1] + cols]
    part = Part(slot=1, base=base, pitch=(cols + gap) * dtype.itemsize)

    def jobs(arena):
        out = arena.output(rows, cols, dtype, stride=width, offset=start[1] * dtype.itemsize)
        return [move(arena.input(x), out, part), copy(arena.input(x), None, replace(part, slot=2))]

    _, digests, nonfinite = check(jobs)
    values = x.view(torch.float8_e4m3fn) if move is copy_codes else x
    assert nonfinite.count_nonzero() == nonfinite[1].count_nonzero()
    assert nonfinite[1] == (~values.float().isfinite()).sum()
    assert digests[1] == digests[2]


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 300)),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.sampled_from([1.0, 0.0, -0.0, 1e-44, 1e-7, 7e4, 1e30, -float("inf")]),
    st.integers(0, 3),
)
def test_any_cast(shape, source, target, factor, gap):
    x = torch.randn(shape[0], shape[1] + gap, generator=torch.Generator().manual_seed(shape[1]))
    x[::2, ::3] *= factor
    x = x.to(source)[:, gap:]
    part = Part(slot=2, base=4 * gap)
    check(lambda arena: [cast(arena.input(x), arena.output(*shape, target), part)])


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_casts_count_nan(source, target):
    """Which NaN a NaN becomes is nobody's contract: PyTorch's own depends on the number of elements."""
    x = torch.ones(5, 300)
    x[1, 7], x[4, 299], x[2, 0] = torch.nan, -torch.nan, torch.inf
    x = x.to(source)

    def jobs(arena):
        return [cast(arena.input(x), arena.output(5, 300, target), Part(slot=2))]

    assert run(jobs, KERNEL, DEVICE)[2].tolist() == [0, 0, 3, 0, 0, 0, 0, 0]


@settings(max_examples=10, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.sampled_from([1, 16, 77, 96])),
    st.tuples(st.integers(0, 127), st.sampled_from([0, 1, 16, 112, 127])),
    st.sampled_from(FLOATS),
    st.sampled_from(FORMULAS),
    st.sampled_from([0.0, 1e-44, 1e-5, 3.0, 3e38, float("inf"), float("nan")]),
    st.sampled_from([1.0, float("inf"), float("nan")]),
)
def test_any_origin(shape, origin, dtype, formula, largest, last):
    """Both steps of blocks of which this is a part, with any amax that the others may have found."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(origin))).to(dtype)
    x[-1, -1] = last
    grid = [-(-(first + extent) // 128) for first, extent in zip(origin, shape, strict=True)]

    def jobs(arena):
        amax = arena.output(*grid, torch.float32, stride=grid[1] + 3)
        given = arena.input(torch.full((grid[0], grid[1] + 1), largest)[:, :-1])
        given[:, 1:] *= 2
        return [
            partial_amax(arena.input(x), amax, Part(1), origin=origin),
            quantized(arena, x, formula, Part(2), amax=given, origin=origin),
        ]

    check(jobs)


@settings(max_examples=10, deadline=None)
@given(
    st.tuples(st.sampled_from([1, 30, 128, 140]), st.sampled_from([1, 16, 77, 128, 144])),
    st.integers(0, 0x7F),
    st.sampled_from([1.0, 2.0**-9, 2.0**-126, 2.0**-140, 2.0**100, 0.37, 0.0, -1.0, float("nan")]),
    st.sampled_from([0, 16, 48]),
)
def test_any_canonical_digest(shape, largest, scale, base):
    """Codes up to any magnitude under scales that can, and that cannot, be made smaller."""
    weight = random_bytes(*shape)
    weight = weight & 0x80 | (weight & 0x7F).clamp(max=largest)
    grid = [-(-extent // 128) for extent in shape]
    scale_inv = torch.exp2(torch.arange(3.0 * grid[0])).view(grid[0], 3)[:, : grid[1]]
    scale_inv[0] = scale
    part = Part(slot=3, base=base, scale_base=40_000, scale_pitch=12)
    check(lambda arena: [canonical_digest(arena.input(weight), arena.input(scale_inv), part)])


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("row", [64, 100, 130])
def test_blocks_cut_between_holders(row, formula):
    """Partial amax of both pieces, their maximum, and then the bytes of the uncut matrix."""
    x = hard(260, 200)
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
    given_amax = [full[: parts[0].shape[0]].clone(), full[start:].clone()]

    def codes(arena):
        return [
            quantized(
                arena, piece, formula, Part(base=at * 200), amax=arena.input(amax), origin=origin
            )
            for (piece, origin), amax, at in zip(pieces, given_amax, (0, row), strict=True)
        ]

    memories, _, _ = check(codes)
    joined = torch.cat([memories[0][: row * 200], memories[2][: (260 - row) * 200]])
    assert torch.equal(joined, whole.weight.view(torch.uint8).flatten())


def test_canonical_digest_survives_reencoding():
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
