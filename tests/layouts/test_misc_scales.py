"""`scales="misc"`: codes where the engine keeps them, scale_inv in whole tensors for its loader."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fp8sync.engines.vllm.storage import misc_scales
from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.manifest import Manifest
from fp8sync.plan import build_plan
from fp8sync.plan.explain import explain
from fp8sync.recipe import BLOCK, Formula
from tests.layouts import wire
from tests.layouts.cases import QWEN

TRAINERS = {"tp2": TrainerLayout(tp=2), "fsdp3": TrainerLayout(dp=3, fsdp=3)}


def apart(destination: Manifest) -> Manifest:
    """The destination with the scales of each box where they lie in the whole scale_inv."""
    ranks = {}
    for rank, boxes in destination.ranks.items():
        ranks[rank] = [
            replace(b, scale_at=misc_scales(destination.tensors[b.tensor]).at(_block(b.start)))
            if b.scale_at
            else b
            for b in boxes
        ]
    return Manifest.of(destination.tensors.values(), ranks)


def _block(start: tuple[int, ...]) -> list[int]:
    return [a // BLOCK for a in start]


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("way", ["buckets", "one-sided"])
@pytest.mark.parametrize("formula", list(Formula), ids=lambda f: f.value)
def test_scales_land_in_the_whole_tensor(trainer: str, way: str, formula: Formula) -> None:
    """Two engine ranks: each is sent the scales of its own blocks, at their place in the whole."""
    source = manifest(TRAINERS[trainer], QWEN)
    paired = manifest(EngineLayout(tp=2, formula=formula), QWEN)
    destination = apart(paired)
    plan = build_plan(source, destination, exchange_amax=True)
    tensors = wire.random_tensors(source)
    found = wire.storages(destination, None)
    held = wire.storages(source, tensors)
    if way == "buckets":
        wire.carry_out(plan, held, found, 60_000)
    else:
        assert not wire.write_out(plan, held, found)  # no digest differs
    wanted = wire.storages(destination, wire.quantized(destination, tensors))
    assert not wire.differing(found, wanted)
    other = build_plan(source, paired, exchange_amax=True)
    assert [(c.weight_bytes, c.scale_bytes) for c in plan.copies] == [
        (c.weight_bytes, c.scale_bytes) for c in other.copies
    ]
    blockwise = sum(info.formula is not None for info in destination.tensors.values())
    assert f"misc scale_inv of {blockwise} bulk tensors" in explain(plan)
