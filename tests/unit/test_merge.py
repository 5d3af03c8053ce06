"""Ranks of one side decide for themselves; what one has to take whole, all take whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from fp8sync.engines.vllm.storage import EngineLayout, contiguous, misc_scales, misc_specs
from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import MISC, build_plan
from fp8sync.plan.merge import merge_ranks, taken_whole, with_misc
from fp8sync.recipe import Encoding, Formula

SHAPE = 576, 256
ROWS = 192  # of each of three ranks: the third one's begin and end with blocks, as the tensor does
CUT = "its scales cannot be cut where the weight is"
HELD = TensorInfo("up", SHAPE, "bfloat16")
DEQUANTIZED = TensorInfo("up", SHAPE, "bfloat16", Encoding.BLOCKWISE, Formula.POW2)
PAIR = replace(DEQUANTIZED, dtype="float8_e4m3fn")


def worker(rank: int, info: TensorInfo) -> Manifest:
    """As a worker lists it: whole with a reason, or its rows."""
    start, shape, at = (0, 0), SHAPE, Placement(MISC + "up", 0, contiguous(SHAPE))
    scale_at = misc_scales(info) if info.dtype == PAIR.dtype else None
    if not info.misc:
        start, shape = (ROWS * rank, 0), (ROWS, SHAPE[1])
        at = Placement("mlp.weight", 0, (256, 1))
        scale_at = scale_at and Placement("mlp.weight_scale_inv", 0, (2, 1))
    return Manifest.of([info], {rank: [Box("up", start, shape, at, scale_at)]})


def trainer() -> Manifest:
    at = Placement("up", 0, contiguous(SHAPE))
    return Manifest.of([HELD], {0: [Box("up", (0, 0), SHAPE, at)]})


@pytest.mark.parametrize("info", [DEQUANTIZED, PAIR], ids=["dequantized", "pair"])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_what_one_rank_takes_whole_all_do(info: TensorInfo, order: tuple[int, ...]) -> None:
    own = [worker(rank, replace(info, misc=CUT if rank < 2 else "")) for rank in range(3)]
    merged = merge_ranks([own[rank] for rank in order])
    assert merged.tensors["up"] == replace(info, misc=CUT)
    plan = build_plan(trainer(), merged, exchange_amax=True)
    assert {copy.at.storage for copy in plan.copies} == {MISC + "up"}
    assert {(copy.start, copy.shape) for copy in plan.copies} == {((0, 0), SHAPE)}
    assert [taken_whole(merged, rank) for rank in range(3)] == [{}, {}, {"up": CUT}]
    for rank in range(3):
        told = with_misc(own[rank], taken_whole(merged, rank))
        alone = build_plan(trainer(), told, exchange_amax=True)
        assert alone.digests(rank) == plan.digests(rank)
        assert alone.tensors == plan.tensors


@pytest.mark.parametrize(
    ("info", "staged"),
    [(DEQUANTIZED, {MISC + "up"}), (PAIR, {MISC + "up", f"{MISC}up_scale_inv"})],
    ids=["dequantized", "pair"],
)
def test_a_worker_stages_what_another_one_takes_whole(info: TensorInfo, staged: set[str]) -> None:
    own = worker(2, info)
    plan = build_plan(trainer(), with_misc(own, {"up": CUT}))
    layout = EngineLayout(own, {}).with_misc_of(plan)
    assert layout.storages == misc_specs([info], scales=info is PAIR)
    assert layout.storages.keys() == staged
    assert layout.processed == {"mlp"}
    assert not layout.quantize  # the pair comes as one


@pytest.mark.parametrize(
    "other",
    [
        replace(DEQUANTIZED, shape=(576, 128)),
        replace(DEQUANTIZED, dtype="float16"),
        replace(DEQUANTIZED, encoding=Encoding.PLAIN, formula=None),
        replace(DEQUANTIZED, formula=Formula.FP32),
    ],
    ids=["shape", "dtype", "encoding", "formula"],
)
@pytest.mark.parametrize("misc", ["", CUT])
def test_other_formats_stay_refused(other: TensorInfo, misc: str) -> None:
    sides = [worker(0, replace(DEQUANTIZED, misc=misc)), worker(1, other)]
    for order in (1, -1):
        with pytest.raises(UnsupportedLayout, match="disagree") as refusal:
            merge_ranks(sides[::order])
        (line,) = refusal.value.violations
        assert line.startswith("up: rank ")
