"""``torch.ops.fp8sync_kernels``: one matrix, as operators that torch.compile and export can trace.

Importing this module registers them. A whole model goes through `run_table` instead, whose launch
is captured in a CUDA graph rather than traced.

    >>> x = torch.ones(200, 128)
    >>> weight, scale_inv, _ = torch.ops.fp8sync_kernels.quantize_matrix(x, "pow2")
    >>> tuple(weight.shape), tuple(scale_inv.shape)
    ((200, 128), (2, 1))
"""

from __future__ import annotations

import torch
from torch import library

from fp8sync_kernels.job import quantize
from fp8sync_kernels.launch import run_table
from fp8sync_kernels.reference.blockwise import grid_shape, quantize_blockwise
from fp8sync_kernels.table import build_table


@library.custom_op("fp8sync_kernels::quantize_matrix", mutates_args=())
def quantize_matrix(
    x: torch.Tensor, formula: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, scale_inv, nonfinite) of `quantize_blockwise`, by the kernel where x is on a GPU.

    Args:
        x: bf16, fp16 or fp32 ``[N, K]``.
        formula: ``"pow2"`` or ``"fp32"``.

    Returns:
        New tensors: float8_e4m3fn ``[N, K]``, float32 ``[ceil(N/128), ceil(K/128)]``, int64 ``[]``.

    Raises:
        TypeError: `x` is not a 2-D bf16, fp16 or fp32 tensor.
        ValueError: unknown formula.
    """
    if x.device.type != "cuda":
        weight, scale_inv, nonfinite = quantize_blockwise(x, formula)
        return weight, scale_inv, nonfinite
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight, scale_inv, nonfinite = _outputs(x)
    nonfinite.zero_()
    table = build_table([quantize(x, formula, weight, scale_inv)], x.device)
    run_table(table, None, nonfinite.view(1))
    return weight, scale_inv, nonfinite


@quantize_matrix.register_fake
def _outputs(
    x: torch.Tensor,
    formula: str = "",  # noqa: ARG001  (the signature is the operator's)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale_inv = x.new_empty(grid_shape(x, (0, 0)), dtype=torch.float32)
    return weight, scale_inv, x.new_empty((), dtype=torch.int64)
