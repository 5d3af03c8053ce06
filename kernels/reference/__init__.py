"""PyTorch references: written for reading, exact on the CPU and on CUDA, without Triton."""

from __future__ import annotations

from fp8sync_kernels.reference.blockwise import (
    Quantized,
    dequantize_blockwise,
    partial_amax,
    quantize_blockwise,
)
from fp8sync_kernels.reference.canonical import canonical_pair
from fp8sync_kernels.reference.digest import digest

__all__ = [
    "Quantized",
    "canonical_pair",
    "dequantize_blockwise",
    "digest",
    "partial_amax",
    "quantize_blockwise",
]
