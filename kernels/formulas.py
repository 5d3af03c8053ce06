"""Names and constants of the number formulas; everything else refers to these.

``pow2``
    ``scale_inv = 2^ceil(log2(max(amax, 1e-4) / 448))`` from the exponent bits of ``amax``, with no
    division; ``codes = cast(x / scale_inv)``, an exact multiply. For blocks with amax >= 1e-4 these
    are the bytes of Transformer Engine (its default), DeepGEMM, vLLM and NeMo-RL.
``fp32``
    ``scale = div_rn(448, amax)``, ``scale_inv = div_rn(1, scale)``, ``codes = cast(x * scale)``;
    scale is 1 where amax is 0 or infinite, and the largest finite value of the source dtype where
    448/amax overflows. Transformer Engine's rule with fp32 scales.

Common to both: ``cast`` rounds to nearest even and saturates at +-448 (infinities too), a NaN becomes
code 0x7F, and a block that holds NaN or infinities has scale_inv 1. Such a block is an error of
whoever made the weights; it is counted, and its bytes are defined only so that they can be tested.
"""

from __future__ import annotations

from typing import Final

POW2: Final = "pow2"
FP32: Final = "fp32"
FORMULAS: Final = (POW2, FP32)

BLOCK: Final = 128
E4M3_MAX: Final = 448.0
POW2_AMAX_FLOOR: Final = 1e-4
CODE_NAN: Final = 0x7F


def check_formula(formula: str) -> str:
    """Return `formula`, or raise ValueError with the names that exist."""
    if formula not in FORMULAS:
        raise ValueError(f"formula {formula!r} is not one of {', '.join(FORMULAS)}")
    return formula
