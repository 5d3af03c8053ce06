"""Workloads of the kernel benchmark: tensors with the shapes of real models, and their tables."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8sync_kernels import Part, Table, build_table
from fp8sync_kernels.descriptor import Column
from fp8sync_kernels.job import quantize

if TYPE_CHECKING:
    from fp8sync_kernels import Job

QWEN3_30B_A3B_EXPERTS = [(768, 2048), (768, 2048), (2048, 768)] * 128
"""The expert matrices of one layer."""
BUCKET_BYTES = 4 << 30
BUCKETS = 2
"""Buffers that buckets take by turns, as a sender does; the L2 cache holds a hundredth of one."""


@dataclass(frozen=True)
class Case:
    """A workload: its bucket tables, bytes read plus written, and what must stay allocated."""

    name: str
    tables: list[Table]
    moved_bytes: int
    tensors: int
    kept: list[torch.Tensor]


def matrix_case(rows: int, cols: int, formula: str, dtype: torch.dtype) -> Case:
    name = f"matrix {rows}x{cols} {str(dtype)[6:]} {formula}"
    return _case(name, [[(rows, cols)]], formula, dtype)


def qwen3_30b_a3b_experts(formula: str, layers: int = 48) -> Case:
    name = f"qwen3-30b-a3b experts, {layers} layers {formula}"
    return _case(name, [QWEN3_30B_A3B_EXPERTS] * layers, formula)


def llama_31_8b(formula: str) -> Case:
    layer = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
    layer += [(14336, 4096), (14336, 4096), (4096, 14336)]
    return _case(f"llama-3.1-8b {formula}", [layer] * 32, formula)


def per_tensor_tables(case: Case) -> list[Table]:
    """The same rows, one table for each tensor."""
    singles = []
    for table in case.tables:
        starts = [*table.rows[:, Column.FIRST_BLOCK].tolist(), table.blocks]
        rows = table.rows.clone()
        rows[:, Column.FIRST_BLOCK] = 0
        device = table.rows.device
        zeros = torch.zeros(max(b - a for a, b in itertools.pairwise(starts)))
        owner = zeros.to(device, torch.int32)
        for i, (start, stop) in enumerate(itertools.pairwise(starts)):
            blocks = stop - start
            singles.append(Table(rows[i : i + 1], owner[:blocks], blocks, table.paths, table.slots))
    return singles


def _case(
    name: str,
    layers: list[list[tuple[int, int]]],
    formula: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    kept: list[torch.Tensor] = []
    tables: list[Table] = []
    jobs: list[Job] = []
    used = moved = tensors = 0
    buckets: list[torch.Tensor] = []
    for shapes in layers:
        sizes = [rows * cols for rows, cols in shapes]
        source = torch.empty(sum(sizes), dtype=dtype, device="cuda").normal_(std=0.02)
        kept.append(source)
        for (rows, cols), x in zip(shapes, source.split(sizes), strict=True):
            grid = (-(-rows // 128), -(-cols // 128))
            scales_at = used + rows * cols
            end = scales_at + -(-grid[0] * grid[1] * 4 // 16) * 16
            if end > BUCKET_BYTES:
                tables.append(build_table(jobs, "cuda"))
                jobs, end, scales_at, used = [], end - used, rows * cols, 0
            if len(tables) == len(buckets) < BUCKETS:
                buckets.append(torch.empty(BUCKET_BYTES, dtype=torch.uint8, device="cuda"))
            bucket = buckets[len(tables) % BUCKETS]
            weight = bucket[used:scales_at].view(rows, cols)
            scale_inv = bucket[scales_at : scales_at + grid[0] * grid[1] * 4]
            scale_inv = scale_inv.view(torch.float32).view(grid)
            slot = Part(slot=len(jobs))
            jobs.append(quantize(x.view(rows, cols), formula, weight, scale_inv, slot))
            moved += x.nbytes + weight.nbytes + scale_inv.nbytes
            tensors += 1
            used = end
    tables.append(build_table(jobs, "cuda"))
    return Case(name, tables, moved, tensors, [*kept, *buckets])
