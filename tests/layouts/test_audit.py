"""An audit on paper's layouts: equal after a refit wherever trainer ranks cut blocks, and not otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8sync.audit.trainer import trainer_ledger
from fp8sync.engines.vllm.live import worker_ledger
from fp8sync.layouts import manifest
from fp8sync.plan import Plan, build_plan
from fp8sync.recipe import Formula
from tests.layouts import wire
from tests.layouts.cases import E, T, dense

BUCKET = 1 << 16
NARROW = dense(hidden=320, intermediate=640)


def digests(plan: Plan, source: wire.Ranks, destination: wire.Ranks) -> tuple[dict, dict]:
    """Of everything that the trainer's ranks hold, and the engine's, by unit."""
    exchanges = wire.agree(plan, source)
    wanted: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for rank, held in source.items():
        ledger = trainer_ledger(held, exchanges[rank].amax, rank, plan, BUCKET, {})
        wanted |= ledger.digests()
    for rank, held in destination.items():
        live: Any = SimpleNamespace(storage=held.__getitem__)
        found |= worker_ledger(lambda live=live: live, plan, rank, BUCKET).digests()
    return wanted, found


@pytest.mark.parametrize("formula", [*Formula, None], ids=str)
@pytest.mark.parametrize("trainer", [T(dp=3, fsdp=3), T(dp=2, fsdp=2, tp=2), T(tp=2, pp=1)])
def test_blocks_cut_between_ranks_are_compared(trainer, formula: Formula | None) -> None:
    engine = E(formula=formula)
    source, destination = manifest(trainer, NARROW), manifest(engine, NARROW)
    plan = build_plan(source, destination, exchange_amax=True)
    assert any(plan.is_cut(copy) for copy in plan.copies) is (formula is not None)
    tensors = wire.random_tensors(source)
    held, staging = wire.storages(source, tensors), wire.storages(destination, None)
    wire.carry_out(plan, held, staging, BUCKET)
    wanted, found = digests(plan, held, staging)
    assert wanted == found
    assert not [why for why in wanted.values() if isinstance(why, str)]

    # One element of one rank's changes, and no amax: its own unit differs and no other.
    name = next(copy.tensor for copy in plan.copies if plan.is_cut(copy) or formula is None)
    storage = next(c.at for c in plan.copies if c.tensor == name)
    flat = staging[0][storage.storage].view(-1)
    kept = flat[storage.offset].clone()
    flat[storage.offset] = torch.tensor(1.5).to(flat.dtype) if kept == 0 else -kept.float()
    _, found = digests(plan, held, staging)
    assert len([key for key in wanted if wanted[key] != found[key]]) == 1
