"""To E4M3, four values to a 32-bit word: nearest even, saturating, NaN to 0x7F.

Triton's own cast leaves single bytes behind, and packing those costs more than all the rest of the
kernel: hence one line of PTX, which the interpreter, unable to run it, replaces by that cast.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def encode_tile(tile: tl.tensor, multiplier: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """uint32 [n, 32, chunks] as tile.load_tile makes them -> uint32 [n, 32] of codes."""
    N: tl.constexpr = tile.shape[0]
    if DTYPE.primitive_bitwidth == 32:
        x = tl.reshape(tile.to(tl.float32, bitcast=True) * multiplier, [N, 8, 2, 2, 2, 2])
        even, odd = tl.split(tl.permute(x, 0, 1, 4, 5, 2, 3))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        codes = encode_quads(x0, x1, x2, x3)
    else:
        x = tl.permute(tl.reshape(tile, [N, 8, 2, 2, 2]), 0, 1, 4, 2, 3)
        first, second = tl.split(x)
        x0, x1 = _halves(first, DTYPE)
        x2, x3 = _halves(second, DTYPE)
        m = multiplier
        codes = encode_quads(x0 * m, x1 * m, x2 * m, x3 * m)
    return tl.reshape(codes, [N, 32])


@triton.jit
def encode_quads(x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor) -> tl.tensor:
    """Four fp32 tensors -> uint32 of their codes, little-endian."""
    if INTERPRETED:
        word = _code(x0) | (_code(x1) << 8) | (_code(x2) << 16) | (_code(x3) << 24)
    else:
        word = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high;"
            " cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
            " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;"
            " mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f",
            [x0, x1, x2, x3],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    return word


@triton.jit
def _halves(words: tl.tensor, DTYPE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    if tl.bfloat16 == DTYPE:  # its bits are the upper half of a float's
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _code(x: tl.tensor) -> tl.tensor:
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32)
