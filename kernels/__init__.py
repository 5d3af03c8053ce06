"""fp8sync_kernels: blockwise FP8 in tensors and out of tensors; knows nothing of fp8sync.

The PyTorch references below need neither a GPU nor Triton.
"""

from __future__ import annotations

from fp8sync_kernels.reference import (
    Quantized,
    dequantize_blockwise,
    digest,
    partial_amax,
    quantize_blockwise,
)

__all__ = ["Quantized", "dequantize_blockwise", "digest", "partial_amax", "quantize_blockwise"]
