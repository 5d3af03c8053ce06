"""Element by element: the plan against a map of every single number.

Nothing here uses the plan's own geometry: a tensor is an array of element numbers, a side is what each
rank holds of it, and a plan is right if every number arrives where it is wanted.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise, product

import pytest
import torch

from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan, fill_buckets, teams
from fp8sync.recipe import Encoding, Formula
from fp8sync.wire.tables import unwritable
from tests.layouts import wire
from tests.layouts.cases import QWEN

SHAPES = [(), (7,), (6, 5), (3, 4, 5)]


def tiling(rng: random.Random, shape: tuple[int, ...], unit: int = 1) -> list[tuple]:
    """Rectangles that tile a tensor: a grid, or strips that are cut differently one by one."""
    if not shape:
        return [((), ())]
    cuts = (
        [0, *sorted(rng.sample(range(unit, shape[0], unit), rng.randint(0, 2))), shape[0]]
        if (len(range(unit, shape[0], unit)) >= 2)
        else [0, shape[0]]
    )
    rects = []
    for low, high in pairwise(cuts):
        for start, size in tiling(rng, shape[1:], unit):
            rects.append(((low, *start), (high - low, *size)))
    return rects


def side(rng: random.Random, infos, ranks: int, copies: int, unit: int = 1, scales: bool = False):
    """Boxes of `copies` whole copies of each tensor, each cut in its own way over the ranks."""
    held: dict[int, list[Box]] = {rank: [] for rank in range(ranks)}
    for info in infos:
        for copy in range(copies):
            for number, (start, shape) in enumerate(tiling(rng, info.shape, unit)):
                strides, step = [0] * len(shape), 1
                for dim in rng.sample(range(len(shape)), len(shape)):
                    strides[dim] = step
                    step = step * shape[dim] + rng.randint(0, 2)
                name = f"{info.name}.{copy}.{number}"
                scale_at = None
                if scales and info.encoding is Encoding.BLOCKWISE:
                    scale_at = Placement(name + "_scale_inv", 3, (-(-shape[1] // 128), 1))
                at = Placement(name, rng.randint(0, 4), tuple(strides))
                held[rng.randrange(ranks)].append(Box(info.name, start, shape, at, scale_at))
    return Manifest.of(infos, held)


def element_numbers(infos) -> wire.Tensors:
    found, first = {}, 0
    for info in infos:
        found[info.name] = torch.arange(first, first + info.numel).view(info.shape)
        first += info.numel
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_number_arrives_once_where_it_is_wanted(seed: int) -> None:
    rng = random.Random(seed)
    infos = [TensorInfo(f"t{n}", shape, "int64") for n, shape in enumerate(SHAPES)]
    source = side(rng, infos, ranks=3, copies=rng.randint(1, 3))
    destination = side(rng, infos, ranks=3, copies=rng.randint(1, 2))
    plan = build_plan(source, destination)
    numbers = element_numbers(infos)
    held = wire.storages(source, numbers)
    wanted = wire.storages(destination, numbers)
    arrived: Counter[tuple[int, str, int]] = Counter()
    for copy in plan.copies:
        for index in product(*(range(n) for n in copy.shape)):
            a, b = copy.source_at.at(index), copy.at.at(index)
            number = int(held[copy.source_rank][a.storage][a.offset])
            assert number == int(wanted[copy.destination_rank][b.storage][b.offset])
            arrived[copy.destination_rank, b.storage, b.offset] += 1
    expected = {
        (rank, box.at.storage, box.at.at(index).offset)
        for rank, boxes in destination.ranks.items()
        for box in boxes
        for index in product(*(range(n) for n in box.shape))
    }
    assert set(arrived) == expected
    assert set(arrived.values()) <= {1}


@pytest.mark.parametrize("formula", list(Formula), ids=lambda f: f.value)
@pytest.mark.parametrize("seed", range(25))
def test_blocks_cut_in_any_way_get_the_whole_tensors_scale(seed: int, formula: Formula) -> None:
    """Copies of the trainer cut differently from one another, engines in whole blocks."""
    rng = random.Random(seed)
    shapes = [(300, 200), (128, 257), (576, 64)]
    infos = [
        TensorInfo(f"w{n}", s, "float8_e4m3fn", Encoding.BLOCKWISE, formula)
        for n, s in enumerate(shapes)
    ]
    plain = [TensorInfo(i.name, i.shape, "bfloat16") for i in infos]
    source = side(rng, plain, ranks=3, copies=rng.randint(1, 2), unit=rng.choice([16, 43, 64]))
    destination = side(rng, infos, ranks=2, copies=rng.randint(1, 2), unit=128, scales=True)
    plan = build_plan(source, destination, exchange_amax=True)
    tensors = wire.random_tensors(source, seed)
    held = wire.storages(source, tensors)
    found = wire.storages(destination, None)
    wire.carry_out(plan, held, found, 4_000)
    wanted = wire.storages(destination, wire.quantized(destination, tensors))
    assert not wire.differing(found, wanted)
    if not unwritable(plan.copies):  # storages of these layouts may lie column by column
        written = wire.storages(destination, None)
        assert not wire.write_out(plan, held, written)
        assert not wire.differing(written, wanted)


@pytest.mark.parametrize("seed", range(25))
def test_an_amax_group_is_whole_and_no_cut_block_is_without(seed: int) -> None:
    rng = random.Random(seed)
    info = TensorInfo("w", (300, 200), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
    plain = TensorInfo("w", info.shape, "bfloat16")
    source = side(rng, [plain], ranks=3, copies=1, unit=rng.choice([16, 43, 64]))
    whole = Manifest.of([info], {0: [Box("w", (0, 0), info.shape, Placement("d", 0, (200, 1)))]})
    plan = build_plan(source, whole, exchange_amax=True)
    owner = torch.full(info.shape, -1)
    for number, box in enumerate(b for boxes in source.ranks.values() for b in boxes):
        wire.cut(owner, box.start, box.shape).fill_(number)
    cut_blocks = {
        (i, j)
        for i, j in product(range(3), range(2))
        if len(owner[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128].unique()) > 1
    }
    grouped: Counter[tuple[int, int]] = Counter()
    for group in plan.amax:
        seen = torch.zeros(info.shape, dtype=torch.int)
        for part in group.parts:
            wire.cut(seen, part.start, part.shape).add_(1)
        for i, j in product(
            *(range(a, a + n) for a, n in zip(group.start, group.shape, strict=True))
        ):
            grouped[i, j] += 1
            block = seen[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            assert (block == 1).all()
            block.zero_()
        assert not seen.any()
    assert set(grouped) == cut_blocks
    assert set(grouped.values()) <= {1}


def test_one_exchange_for_each_team() -> None:
    """HSDP 2 x 3: three shards in each of two replicas; nothing crosses between replicas."""
    source = manifest(TrainerLayout(dp=6, fsdp=3), QWEN)
    plan = build_plan(source, manifest(EngineLayout(), QWEN), exchange_amax=True)
    found = teams(plan.amax)
    assert sum(len(groups) for groups in found.values()) == len(plan.amax)
    assert all(len(ranks) > 1 for ranks in found)
    assert {rank // 3 for ranks in found for rank in ranks} == {0, 1}
    assert all(len({rank // 3 for rank in ranks}) == 1 for ranks in found)
    assert list(found) == [(0, 1, 2), (3, 4, 5)]


def test_strips_of_a_cut_copy_end_where_blocks_do() -> None:
    info = TensorInfo("w", (700, 128), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
    plain = TensorInfo("w", info.shape, "bfloat16")
    halves = [
        Box("w", (0, 0), (190, 128), Placement("a", 0, (128, 1))),
        Box("w", (190, 0), (510, 128), Placement("b", 0, (128, 1))),
    ]
    wanted = Box("w", (0, 0), (700, 128), Placement("d", 0, (128, 1)), Placement("s", 0, (1, 1)))
    plan = build_plan(
        Manifest.of([plain], {0: halves[:1], 1: halves[1:]}),
        Manifest.of([info], {0: [wanted]}),
        exchange_amax=True,
    )
    parts = [p.copy for b in fill_buckets(plan.copies, 128 * 128 + 16) for p in b.parts]
    assert [(c.start[0], c.shape[0]) for c in parts] == [
        (0, 128),
        (128, 62),
        (190, 66),
        (256, 128),
        (384, 128),
        (512, 128),
        (640, 60),
    ]
    assert [c.scale_shape[0] for c in parts] == [1, 1, 0, 1, 1, 1, 1]
    assert [c.scale_at.offset for c in parts] == [0, 1, 2, 2, 3, 4, 5]
