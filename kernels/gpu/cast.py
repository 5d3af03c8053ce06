"""fp32 to E4M3, four values to a 32-bit word: nearest even, saturating, NaN to 0x7F.

Triton's own cast leaves single bytes behind, and packing those costs more than all the rest of the
kernel: hence one line of PTX, which the interpreter, unable to run it, replaces by that cast.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def encode_words(x: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr) -> tl.tensor:
    """fp32 [ROWS, COLS] -> uint32 [ROWS, COLS / 4] of little-endian codes."""
    if INTERPRETED:
        codes = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        quads = tl.reshape(codes, [ROWS, COLS // 4, 4]).to(tl.uint32)
        words = tl.sum(quads << (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :], axis=2)
    else:
        even, odd = tl.split(tl.reshape(x, [ROWS, COLS // 4, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        words = tl.inline_asm_elementwise(
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
    return words
