"""Engines of different layouts in one refit: what one of them has to take whole, all do."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fp8sync.cli import main
from fp8sync.layouts import EngineLayout, TrainerLayout, geometry, join, manifest
from fp8sync.layouts.pieces import join_sides
from fp8sync.plan import MISC, build_plan
from fp8sync.plan.spread import side_of
from fp8sync.plan.traffic import traffic
from tests.layouts import wire
from tests.layouts.cases import LATENT

MODEL = replace(LATENT, intermediate=1024, shared_intermediate=512)
TRAINER = TrainerLayout(tp=2, ep=2, etp=1)
# A head has 192 rows, so one of four ranks cuts a block of q_b_proj, and one of two does not.
FOUR, TWO = (EngineLayout(tp=n, expert_parallel=True) for n in (4, 2))
WHOLE = {f"model.layers.{n}.self_attn.q_b_proj.weight" for n in range(2)}


@pytest.mark.parametrize("order", [1, -1])
def test_the_bytes_are_right_and_the_forecast_is_the_plan(order: int) -> None:
    engines = [FOUR, TWO][::order]
    source = manifest(TRAINER, MODEL)
    destination = join([manifest(engine, MODEL) for engine in engines])
    plan = build_plan(source, destination, exchange_amax=True)
    assert {n for n, i in plan.tensors.items() if i.misc} == WHOLE
    for name in WHOLE:
        assert {c.at.storage for c in plan.copies if c.tensor == name} == {MISC + name}

    tensors = wire.random_tensors(source)
    filled = wire.with_misc(destination, plan)
    found = wire.storages(filled, None)
    wire.carry_out(plan, wire.storages(source, tensors), found, 60_000)
    assert not wire.differing(found, wire.storages(filled, wire.quantized(filled, tensors)))

    links: dict[tuple[int, int], int] = {}
    staged: dict[int, int] = {}
    for copy in plan.copies:
        nbytes = copy.weight_bytes + copy.scale_bytes
        key = copy.source_rank, copy.destination_rank
        links[key] = links.get(key, 0) + nbytes
        staged[key[1]] = staged.get(key[1], 0) + nbytes
    paper = traffic(geometry(TRAINER, MODEL), join_sides([geometry(e, MODEL) for e in engines]))
    for counted in (paper, traffic(side_of(source), side_of(destination))):
        assert counted.links == links
        assert counted.staged == staged
        assert counted.copies == len(plan.copies)
        assert counted.misc == {n: i.misc for n, i in plan.tensors.items() if i.misc}


def test_saved_manifests_give_the_same_figures(capsys, tmp_path) -> None:
    """Those of each engine, and that of a link, which is of both."""
    sides = {"four": manifest(FOUR, MODEL), "two": manifest(TWO, MODEL)}
    sides |= {"both": join(list(sides.values())), "trainer": manifest(TRAINER, MODEL)}
    for name, side in sides.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(side.to_json()))
    texts = []
    for names in (("four", "two"), ("both",)):
        engines = [word for name in names for word in ("--engine", str(tmp_path / f"{name}.json"))]
        assert main(["plan", "--trainer", str(tmp_path / "trainer.json"), *engines, "--json"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
