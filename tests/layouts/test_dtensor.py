"""DTensor as the oracle: what `redistribute` leaves on every rank is what the plan brings there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Partial, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import Box, Manifest, Placement
from fp8sync.plan import build_plan
from fp8sync.recipe import Encoding, Formula
from fp8sync.sources.dtensor import local_intervals
from tests.layouts import wire
from tests.layouts.dtensor_ranks import MODULES, MOVES, SHAPES, block, copy_of, ids

RANKS = 4
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Manifests and local tensors that four real gloo ranks wrote down, by key and rank."""
    folder = tmp_path_factory.mktemp("dtensor")
    command = [sys.executable, "-m", "tests.layouts.dtensor_ranks"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), str(folder / "store"), str(folder)], cwd=ROOT
        )
        for rank in range(RANKS)
    ]
    try:
        assert [process.wait(250) for process in ranks] == [0] * RANKS
    finally:
        for process in ranks:
            process.kill()
    manifests = [json.loads((folder / f"{r}.json").read_text()) for r in range(RANKS)]
    tensors = [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(RANKS)]
    return manifests, tensors


def side(world, key: str) -> tuple[Manifest, wire.Ranks]:
    manifests = [Manifest.from_json(m[key]) for m in world[0]]
    assert all(m.tensors == manifests[0].tensors for m in manifests)
    joint = Manifest.of(
        manifests[0].tensors.values(), {r: b for m in manifests for r, b in m.ranks.items()}
    )
    prefix = key + "/"
    held = {
        rank: {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        for rank, tensors in enumerate(world[1])
    }
    return joint, held


@pytest.mark.parametrize("move", MOVES)
def test_the_plan_does_what_redistribute_does(world, move: str) -> None:
    source, held = side(world, f"{move}/before")
    destination, wanted = side(world, f"{move}/after")
    plan = build_plan(source, destination)
    assert {i.shape for i in plan.tensors.values()} == set(SHAPES)
    found = {r: {n: copy_of(t).fill_(-1) for n, t in ts.items()} for r, ts in wanted.items()}
    wire.carry_out(plan, held, found, 256)
    assert not wire.differing(found, wanted)


@pytest.mark.parametrize("move", MOVES)
def test_boxes_say_where_every_element_lies(world, move: str) -> None:
    for end in ("before", "after"):
        manifest, held = side(world, f"{move}/{end}")
        for rank, boxes in manifest.ranks.items():
            counted = 0
            for box in boxes:
                whole = ids(manifest.tensors[box.tensor].shape)
                local = wire.view(held[rank], box.at, box.shape)
                assert torch.equal(local, wire.cut(whole, box.start, box.shape))
                counted += local.numel()
            assert counted == sum(t.numel() for t in held[rank].values())


@pytest.mark.parametrize("kind", MODULES)
def test_a_sharded_module_is_read_where_it_lies(world, kind: str) -> None:
    """FSDP2, HSDP and FSDP2 over tensor parallelism, expert stacks included, into blockwise FP8."""
    source, held = side(world, kind)
    whole = _hf_names(block())
    infos, boxes = [], []
    for info in source.tensors.values():
        at = Placement(info.name, 0, whole[info.name].stride())
        scale_at = None
        if len(info.shape) == 2:
            info = replace(
                info, dtype="float8_e4m3fn", encoding=Encoding.BLOCKWISE, formula=Formula.FP32
            )
            scale_at = Placement(info.name + "_scale_inv", 0, (-(-info.shape[1] // 128), 1))
        infos.append(info)
        boxes.append(Box(info.name, (0,) * len(info.shape), info.shape, at, scale_at))
    destination = Manifest.of(infos, {0: boxes, 1: boxes})
    plan = build_plan(source, destination, exchange_amax=True)
    assert plan.amax
    found = wire.storages(destination, None)
    wire.carry_out(plan, held, found, 60_000)
    wanted = wire.quantized(destination, whole)
    assert not wire.differing(found, wire.storages(destination, wanted))
    loads = [sum(c.weight_bytes for c in plan.copies if c.source_rank == r) for r in range(RANKS)]
    assert max(loads) < 1.6 * sum(loads) / RANKS


def _hf_names(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in module.state_dict().items():
        if name == "tied.weight":
            continue  # listed once
        if not name.startswith("mlp.experts."):
            found[name] = value
            continue
        for expert, one in enumerate(value):
            if name.endswith("gate_up_proj"):
                gate, up = one.chunk(2)
                found[f"mlp.experts.{expert}.gate_proj.weight"] = gate.contiguous()
                found[f"mlp.experts.{expert}.up_proj.weight"] = up.contiguous()
            else:
                found[f"mlp.experts.{expert}.down_proj.weight"] = one.contiguous()
    return found


@pytest.mark.parametrize("length", [1, 7, 10, 16])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_chunks_are_those_of_torch(length: int, ranks: int) -> None:
    wanted = list(torch.arange(length).chunk(ranks))
    for rank in range(ranks):
        (intervals,) = local_intervals([length], [ranks], [Shard(0)], [rank])
        held = [i for first, n in intervals for i in range(first, first + n)]
        assert held == (wanted[rank].tolist() if rank < len(wanted) else [])


@pytest.mark.parametrize("length", [8, 10, 13])
def test_fsdp_over_tensor_parallelism_cuts_each_shard(length: int) -> None:
    """mesh (dp, tp): the tensor-parallel shard is cut by dp, the other way round than axes are listed."""
    for dp in range(2):
        for tp in range(2):
            (intervals,) = local_intervals(
                [length], [2, 2], [_StridedShard(0, split_factor=2), Shard(0)], [dp, tp]
            )
            held = [i for first, n in intervals for i in range(first, first + n)]
            if length % 4 == 0:
                assert held == torch.arange(length).chunk(2)[tp].chunk(2)[dp].tolist()
    everything = [
        i
        for dp in range(2)
        for tp in range(2)
        for first, n in local_intervals(
            [length], [2, 2], [_StridedShard(0, split_factor=2), Shard(0)], [dp, tp]
        )[0]
        for i in range(first, first + n)
    ]
    assert sorted(everything) == list(range(length))


def test_a_sum_that_is_not_reduced_is_refused() -> None:
    with pytest.raises(UnsupportedLayout, match="mesh axis 1 is neither a shard nor a replica"):
        local_intervals([8], [2, 2], [Shard(0), Partial()], [0, 0])
