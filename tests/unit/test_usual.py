"""Kernels that are compiled before there is a plan are those that it needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.layouts.parse import parse_model
from fp8sync.plan import build_plan, in_parts
from fp8sync.recipe import Recipe
from fp8sync.sending.usual import usual_copies, usual_tables
from fp8sync.sending.writer import as_written
from fp8sync.wire.tables import check_table, write_table

CPU = torch.device("cpu")
ALIGNED = 1 << 30


def kinds(tables):
    return {(table.paths, len(table.rows) == 1) for table in tables}


def parts_of(model: str):
    """What the trainer holds, and its share in seven parts, of two layers at full width."""
    shape = replace(parse_model(model), layers=2)
    held, wanted = manifest(TrainerLayout(), shape), manifest(EngineLayout(), shape)
    copies = list(as_written(build_plan(held, wanted).copies))
    return held, [part for part in in_parts(copies, [1, 3, 9, 27, 9, 3, 1]) if part]


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "llama-3.1-8b"])
def test_a_link_asks_for_usual_kernels(model):
    held, parts = parts_of(model)
    recipe = Recipe("blockwise-pow2")
    written = kinds(
        write_table(part, lambda _: (ALIGNED, "bfloat16"), lambda _, __: ALIGNED, CPU)
        for part in parts
    )
    assert len(written) == 2  # embeddings alone, and with matrices
    assert written <= kinds(usual_tables(held.tensors.values(), recipe, CPU))
    checked = kinds(check_table(part, lambda _: ALIGNED, CPU) for part in parts)
    assert checked == kinds([usual_copies(CPU)])
