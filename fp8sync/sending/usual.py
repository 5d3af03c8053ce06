"""Kernels that most links need, compiled before a plan says which.

The trainer's while workers trace, and the worker's when vLLM makes the backend: so the first refit waits for
no compiler. What else a plan needs is compiled when its tables are made.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from fp8sync.plan.boxes import block_shape
from fp8sync.recipe import Encoding, Formula
from fp8sync.wire.tables import moved
from fp8sync_kernels import Matrix, Part, build_table, compile_ahead, job

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp8sync.manifest import TensorInfo
    from fp8sync.recipe import Recipe
    from fp8sync_kernels import Job, Table

__all__ = ["compile_taking", "compile_writing", "usual_copies", "usual_tables"]


def compile_writing(held: Iterable[TensorInfo], recipe: Recipe, device: torch.device) -> None:
    """Compile what a trainer rank on `device` will probably launch; nothing where that is no GPU."""
    if device.type != "cuda":
        return
    # What cannot be compiled is tried again, and told, where a plan needs it.
    with suppress(Exception):
        for table in usual_tables(held, recipe, device):
            compile_ahead(table)


def compile_taking(device: torch.device) -> None:
    """Compile what a worker on `device` will probably launch; nothing where that is no GPU."""
    if device.type != "cuda":
        return
    with suppress(Exception):  # as above
        table = usual_copies(device)
        compile_ahead(table, nonfinite=False)  # verifies
        compile_ahead(table, digests=False, nonfinite=False)  # installs


def usual_copies(device: torch.device) -> Table:
    """A table on `device` with jobs as a worker has them, be it to verify or to install."""
    line = _matrix(1, 1024, "uint8")
    return build_table([job.copy(line, None)] * 2, device)


def usual_tables(held: Iterable[TensorInfo], recipe: Recipe, device: torch.device) -> list[Table]:
    """Tables with jobs of the kinds that a refit of `held` will probably have, on `device`.

    If the most frequent matrix is not FP8 yet, it stands for those that are quantized. All else stays as it
    is: the only kind in a first and last launch, of the embeddings.
    """
    held = list(held)
    lines = [_matrix(1, 1024, dtype) for dtype in sorted({info.dtype for info in held})]
    kept = [moved(line, line, Part()) for line in lines]
    if any(info.encoding is Encoding.BLOCKWISE for info in held):
        scales = _matrix(1, 1024, "float32")
        kept.append(job.copy(scales, scales))
    launches = [kept * 2]
    matrices = Counter((i.shape[-2:], i.dtype, i.encoding) for i in held if len(i.shape) > 1)
    for (shape, dtype, encoding), _ in matrices.most_common(1):
        if recipe.quantizes and encoding is Encoding.PLAIN:
            formulas = sorted({recipe.formula(formula).value for formula in Formula})
            launches += [[_quantized(shape, dtype, formula), *kept] for formula in formulas]
    return [build_table(jobs, device) for jobs in launches]


def _quantized(shape: tuple[int, ...], dtype: str, formula: str) -> Job:
    rows, cols = shape
    down, across = block_shape(shape)
    scales = _matrix(down, across, "float32")
    return job.quantize(_matrix(rows, cols, dtype), formula, _matrix(rows, cols, "uint8"), scales)


def _matrix(rows: int, cols: int, dtype: str) -> Matrix:
    """A rectangle somewhere, aligned as memory is; it is never read."""
    return Matrix(1 << 20, rows, cols, cols, getattr(torch, dtype))
