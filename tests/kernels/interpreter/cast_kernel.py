from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cast_kernel(source, target, N: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    at = tl.arange(0, N)
    converted = tl.load(source + at).to(DTYPE)
    tl.store(target + at, converted.to(BITS, bitcast=True))
