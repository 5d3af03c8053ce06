"""fp8sync_kernels: blockwise FP8 in tensors and out of tensors; knows nothing of fp8sync.

Two front doors. For one matrix, `quantize_blockwise` and `dequantize_blockwise`: PyTorch, exact on
the CPU and on CUDA, written for reading. For a whole model, a descriptor table: say what shall be
done as jobs (`fp8sync_kernels.job`), lay them out once with `build_table`, and run them with
`run_table`, on a GPU as one launch.

Importing this needs neither a GPU nor Triton.
"""

from __future__ import annotations

from fp8sync_kernels.job import Job, Matrix, Part
from fp8sync_kernels.launch import compile_ahead, run_table
from fp8sync_kernels.reference import (
    Quantized,
    canonical_pair,
    dequantize_blockwise,
    digest,
    partial_amax,
    quantize_blockwise,
)
from fp8sync_kernels.table import Table, build_table

__all__ = [
    "Job",
    "Matrix",
    "Part",
    "Quantized",
    "Table",
    "build_table",
    "canonical_pair",
    "compile_ahead",
    "dequantize_blockwise",
    "digest",
    "partial_amax",
    "quantize_blockwise",
    "run_table",
]
