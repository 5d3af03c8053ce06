"""Job lists that both the interpreter's tests and the GPU's run: name -> function of an arena."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import torch

from fp8sync_kernels.formulas import FORMULAS
from fp8sync_kernels.job import (
    Part,
    canonical_digest,
    cast,
    copy,
    copy_codes,
    partial_amax,
    quantize,
)
from tests.kernels.cases import FLOATS, all_bf16_patterns, hard, with_nonfinite

WHOLE = Part()
SHAPES = [(128, 128), (200, 304), (130, 77), (1, 16), (3, 1)]
STRIDED = [((33, 1040), 2048), ((3, 5000), 5000), ((33, 36), 40), ((5, 31), 33)]


def quantized(arena, x, formula, part=WHOLE, gap=0, **given):
    """A quantize job into fresh outputs, rectangles of larger tensors if there is a gap between rows."""
    rows, cols = x.shape
    origin = given.get("origin", (0, 0))
    grid = (-(-(origin[0] + rows) // 128), -(-(origin[1] + cols) // 128))
    weight = arena.output(rows, cols, stride=cols + gap)
    scale_inv = arena.output(*grid, torch.float32, stride=grid[1] + gap)
    return quantize(arena.input(x), formula, weight, scale_inv, part, **given)


def one(arena, x, formula, slot=0):
    return [quantized(arena, x, formula, Part(slot=slot))]


def by_magnitude():
    """Every finite bf16 pattern, sorted, in 103 blocks of 5 rows: 2.5 octaves and both signs in each."""
    x = all_bf16_patterns().flatten()
    x = torch.where(x.isfinite(), x, torch.zeros_like(x))
    x = x[x.float().abs().argsort(stable=True)]
    x = torch.cat([x.new_zeros(103 * 5 * 128 - len(x)), x])
    return x.view(103, 5, 128).transpose(0, 1).reshape(5, -1)


def everything(arena):
    """One launch: several dtypes, formulas, strides and slots, copies, casts, digests."""
    wide = hard(300, 400)
    codes = random_bytes(70, 200)
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


def copies(arena, shape, stride):
    rows, cols = shape
    x = random_bytes(rows, stride)[:, :cols]
    return [
        copy(arena.input(x), arena.output(rows, cols, stride=stride), Part(slot=0)),
        copy(arena.input(x), None, Part(slot=1)),
    ]


def codes(arena, shape, stride):
    """Pairs that pass through: NaN counted; as bytes, the same values are not."""
    rows, cols = shape
    x = random_bytes(rows, stride)[:, :cols]
    x[rows // 2] = 0xFF
    return [
        copy_codes(arena.input(x), arena.output(rows, cols, stride=stride), Part(slot=0)),
        copy_codes(arena.input(x), None, Part(slot=1)),
        copy(arena.input(x), arena.output(rows, cols), Part(slot=2)),
    ]


def only_nan(arena):
    """More NaN in a tile than any of its partial sums may hold bits for."""
    x = torch.full((64, 1024), 0x7F, dtype=torch.uint8)
    return [copy_codes(arena.input(x), arena.output(64, 1024), Part(slot=5))]


def same(arena, dtype):
    """Every pattern of the elements, or of their upper halves; some also from other alignments."""
    x = all_bf16_patterns().view(torch.int16)
    if dtype == torch.float32:
        x = (x.int() << 16) + torch.arange(256, dtype=torch.int32)
    x = x.view(dtype)
    return [
        cast(arena.input(part), arena.output(*part.shape, dtype), Part(slot))
        for slot, part in enumerate((x, x[0x78:0x88, 1:], x[0x78:0x88, 2:]))
    ]


def casts(arena, source, target):
    x = hard(17, 300, source)
    return [cast(arena.input(x), arena.output(17, 300, target, stride=320))]


def amaxes(arena, origin):
    x = with_nonfinite(hard(150, 160))
    grid = (-(-(origin[0] + 150) // 128), -(-(origin[1] + 160) // 128))
    return [partial_amax(arena.input(x), arena.output(*grid, torch.float32), origin=origin)]


def given(arena, origin, formula):
    """Given amax, among them 448 * 2^-10, where pow2's scale doubles, and its neighbours."""
    x = hard(150, 160)
    grid = (-(-(origin[0] + 150) // 128), -(-(origin[1] + 160) // 128))
    amax = torch.rand(grid, generator=torch.Generator().manual_seed(1)) * 2
    amax.view(-1)[:3] = torch.tensor([0.4375 - 2**-25, 0.4375, 0.4375 + 2**-25])
    return [quantized(arena, x, formula, amax=arena.input(amax), origin=origin)]


def canonical(arena, cols):
    """Every code, NaN of both signs too, under scales that are and are not powers of two.

    Zeros of both signs under one whose ratio to the canonical scale overflows.
    """
    weight = random_bytes(200, cols)
    weight[:128, :128] = weight[:128, :128].clamp(max=0x70)
    weight[:128, 128:] &= 0x80
    scale_inv = torch.tensor([[2.0**-9, 2.0**120], [0.37, -1.0]])
    return [canonical_digest(arena.input(weight), arena.input(scale_inv))]


def random_bytes(rows, cols):
    generator = torch.Generator().manual_seed(rows * cols)
    return torch.randint(0, 256, (rows, cols), dtype=torch.uint8, generator=generator)


def scenarios():
    """Name -> function of an arena."""
    named = {"everything": everything}
    for formula in FORMULAS:
        named[f"patterns-{formula}"] = partial(one, x=all_bf16_patterns(), formula=formula)
        named[f"magnitudes-{formula}"] = partial(one, x=by_magnitude(), formula=formula)
        for dtype in FLOATS:
            short = str(dtype)[6:]
            x = with_nonfinite(hard(140, 272, dtype))
            named[f"nonfinite-{short}-{formula}"] = partial(one, x=x, formula=formula, slot=3)
            for shape in SHAPES:
                name = f"{shape[0]}x{shape[1]}-{short}-{formula}"
                named[name] = partial(one, x=hard(*shape, dtype), formula=formula)
        for origin in ((64, 48), (100, 33)):
            named[f"given-{origin}-{formula}"] = partial(given, origin=origin, formula=formula)
    for dtype in FLOATS:
        named[f"same-{str(dtype)[6:]}"] = partial(same, dtype=dtype)
    for source, target in permutations(FLOATS, 2):
        name = f"cast-{str(source)[6:]}-{str(target)[6:]}"
        named[name] = partial(casts, source=source, target=target)
    for shape, stride in STRIDED:
        named[f"copy-{shape[0]}x{shape[1]}"] = partial(copies, shape=shape, stride=stride)
        named[f"codes-{shape[0]}x{shape[1]}"] = partial(codes, shape=shape, stride=stride)
    named["codes-nan"] = only_nan
    for origin in ((0, 0), (64, 48), (100, 33)):
        named[f"amax-{origin}"] = partial(amaxes, origin=origin)
    for cols in (144, 131):
        named[f"canonical-{cols}"] = partial(canonical, cols=cols)
    return named
