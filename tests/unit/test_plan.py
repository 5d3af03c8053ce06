"""A plan moves every element that the engine wants exactly once; brute force says so."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8sync.errors import TensorMismatch, UnsupportedLayout
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan, explain, fill_buckets
from fp8sync.recipe import Encoding, Formula
from tests.unit import layouts
from tests.unit.layouts import Side


@st.composite
def joined(draw: st.DrawFn, kind: str) -> tuple[list[TensorInfo], Side, Side]:
    """(the engine's tensors, a trainer, an engine)."""
    if kind == "plain":
        infos = draw(layouts.plain_infos())
        unit = 1
    else:
        infos = draw(layouts.blockwise_infos())
        unit = 128
    source = draw(layouts.sides(infos, unit=unit, replicas=draw(st.integers(1, 3))))
    destination = draw(
        layouts.sides(infos, unit=unit, replicas=draw(st.integers(1, 2)), scales=True)
    )
    return infos, source, destination


@pytest.mark.parametrize("kind", ["plain", "blockwise"])
@given(data=st.data())
def test_every_element_arrives_exactly_once(kind: str, data: st.DataObject) -> None:
    infos, source, destination = data.draw(joined(kind))
    plan = build_plan(source.manifest(layouts.as_source(infos)), destination.manifest(infos))
    ids = layouts.element_ids(infos)
    found, writes = layouts.carry_out(plan.copies, layouts.filled(source, ids), destination.sizes)
    wanted = layouts.filled(destination, ids)
    for name in (box.at.storage for box in layouts.boxes(destination)):
        assert np.array_equal(found[name], wanted[name])
        assert np.array_equal(writes[name], (wanted[name] >= 0).astype(int))


@given(data=st.data())
def test_every_scale_arrives_exactly_once(data: st.DataObject) -> None:
    infos, source, destination = data.draw(joined("blockwise"))
    plan = build_plan(source.manifest(layouts.as_source(infos)), destination.manifest(infos))
    blocks = [TensorInfo(i.name, tuple(-(-n // 128) for n in i.shape), "float32") for i in infos]
    ids = layouts.element_ids(blocks)
    writes = Counter()
    for copy in plan.copies:
        first = tuple(a // 128 for a in copy.start)
        cells = layouts.part_of(ids[copy.tensor], first, copy.scale_shape)
        places = layouts.window(
            np.arange(destination.sizes[copy.scale_at.storage]), copy.scale_at, copy.scale_shape
        )
        for block, place in zip(cells.ravel(), places.ravel(), strict=True):
            writes[copy.scale_at.storage, int(place), int(block)] += 1
    wanted = Counter()
    for box in layouts.boxes(destination):
        first = tuple(a // 128 for a in box.start)
        shape = tuple(-(-n // 128) for n in box.shape)
        cells = layouts.part_of(ids[box.tensor], first, shape)
        places = layouts.window(
            np.arange(destination.sizes[box.scale_at.storage]), box.scale_at, shape
        )
        for block, place in zip(cells.ravel(), places.ravel(), strict=True):
            wanted[box.scale_at.storage, int(place), int(block)] += 1
    assert writes == wanted


@given(data=st.data())
def test_a_copy_stays_within_the_boxes_of_its_ranks(data: st.DataObject) -> None:
    infos, source, destination = data.draw(joined("plain"))
    plan = build_plan(source.manifest(infos), destination.manifest(infos))
    for copy in plan.copies:
        owners = source.ranks[copy.source_rank]
        takers = destination.ranks[copy.destination_rank]
        assert any(b.at.storage == copy.source_at.storage and _inside(copy, b) for b in owners)
        assert any(b.at.storage == copy.at.storage and _inside(copy, b) for b in takers)


def _inside(copy, box: Box) -> bool:
    ends = zip(copy.start, copy.shape, box.start, box.shape, strict=True)
    return copy.tensor == box.tensor and all(a >= b and a + n <= b + m for a, n, b, m in ends)


@given(data=st.data())
def test_both_sides_compute_the_same_digests(data: st.DataObject) -> None:
    """The trainer plans for all engine ranks at once, a worker for itself alone."""
    infos, source, destination = data.draw(joined("blockwise"))
    held = source.manifest(layouts.as_source(infos))
    together = build_plan(held, destination.manifest(infos))
    for rank, boxes in destination.ranks.items():
        sent = Manifest.from_json(held.to_json())
        alone = build_plan(sent, Manifest.of(infos, {rank: boxes}))
        assert alone.digest(rank) == together.digest(rank)
        assert alone.digests(rank) == together.digests(rank)
        assert alone.to_rank(rank) == together.to_rank(rank)


@pytest.mark.parametrize("kind", ["plain", "blockwise"])
@given(data=st.data())
def test_replicas_may_be_cut_differently(kind: str, data: st.DataObject) -> None:
    """Two whole copies on the trainer, each in a grid of its own, so that boxes overlap."""
    infos, source, destination = data.draw(joined(kind))
    unit = 128 if kind == "blockwise" else 1
    other = data.draw(layouts.sides(infos, unit=unit))
    renamed = Side(
        {10 + rank: [_renamed(box) for box in held] for rank, held in other.ranks.items()},
        {f"other/{name}": size for name, size in other.sizes.items()},
    )
    both = Side(source.ranks | renamed.ranks, source.sizes | renamed.sizes)
    plan = build_plan(both.manifest(layouts.as_source(infos)), destination.manifest(infos))
    ids = layouts.element_ids(infos)
    found, writes = layouts.carry_out(plan.copies, layouts.filled(both, ids), destination.sizes)
    wanted = layouts.filled(destination, ids)
    for name in (box.at.storage for box in layouts.boxes(destination)):
        assert np.array_equal(found[name], wanted[name])
        assert np.array_equal(writes[name], (wanted[name] >= 0).astype(int))


def _renamed(box: Box) -> Box:
    at = Placement(f"other/{box.at.storage}", box.at.offset, box.at.strides)
    return Box(box.tensor, box.start, box.shape, at)


def test_replicas_share_the_work() -> None:
    """Four boxes, each held by both trainer ranks: two from either."""
    info = TensorInfo("w", (8,), "float32")
    parts = [Box("w", (2 * i,), (2,), Placement(f"part{i}", 0, (1,))) for i in range(4)]
    destination = Manifest.of([info], {0: parts})
    source = Manifest.of([info], {0: parts, 1: parts})
    senders = Counter(copy.source_rank for copy in build_plan(source, destination).copies)
    assert senders == {0: 2, 1: 2}


def test_every_field_changes_the_digest() -> None:
    def digest(**change: object) -> str:
        fields = {"offset": 0, "strides": (4, 1), "dtype": "float32", "name": "w"} | change
        info = TensorInfo(fields["name"], (2, 4), fields["dtype"])
        whole = Box(fields["name"], (0, 0), (2, 4), Placement("s", 0, (4, 1)))
        at = Placement("d", fields["offset"], fields["strides"])
        box = Box(fields["name"], (0, 0), (2, 4), at)
        source, destination = Manifest.of([info], {0: [whole]}), Manifest.of([info], {0: [box]})
        return build_plan(source, destination).digest(0)

    variants = [{}, {"offset": 1}, {"strides": (5, 1)}, {"dtype": "bfloat16"}, {"name": "v"}]
    assert len({digest(**change) for change in variants}) == len(variants)


# --- refusals -------------------------------------------------------------------------------------


@given(data=st.data())
def test_a_cut_block_is_refused_and_every_one_is_named(data: st.DataObject) -> None:
    infos = data.draw(layouts.blockwise_infos())
    source = data.draw(layouts.sides(infos, unit=data.draw(st.sampled_from([64, 128]))))
    destination = data.draw(layouts.sides(infos, unit=data.draw(st.sampled_from([64, 128]))))
    shapes = {info.name: info.shape for info in infos}
    expected = 0
    for wanted in layouts.boxes(destination):
        for held in layouts.boxes(source):
            if held.tensor == wanted.tensor:
                expected += _cuts_a_block(wanted, held, shapes[wanted.tensor])
    manifests = source.manifest(layouts.as_source(infos)), destination.manifest(infos)
    if not expected:
        assert build_plan(*manifests).copies
        return
    with pytest.raises(UnsupportedLayout) as refusal:
        build_plan(*manifests)
    assert len(refusal.value.violations) == expected
    for line in refusal.value.violations:
        assert any(line.startswith(f"{name}: copy [") for name in shapes)
        assert "cuts a 128-block in dim" in line
        assert "to engine rank" in line


def _cuts_a_block(a: Box, b: Box, shape: tuple[int, ...]) -> bool:
    """By brute force: does the common part hold some elements of a block, but not all?"""
    masks = []
    for a0, an, b0, bn, full in zip(a.start, a.shape, b.start, b.shape, shape, strict=True):
        mask = np.zeros(full, dtype=bool)
        mask[max(a0, b0) : max(0, min(a0 + an, b0 + bn))] = True
        masks.append(mask)
    if not all(mask.any() for mask in masks):
        return False
    pieces = [mask[i : i + 128] for mask in masks for i in range(0, len(mask), 128)]
    return any(piece.any() and not piece.all() for piece in pieces)


def _whole(name: str, shape: tuple[int, ...], start: tuple[int, ...] | None = None) -> Box:
    strides = tuple(int(np.prod(shape[d + 1 :])) for d in range(len(shape)))
    return Box(name, start or (0,) * len(shape), shape, Placement(name, 0, strides))


def test_missing_superfluous_and_misshapen_tensors_are_listed_at_once() -> None:
    shapes = {"both": (4,), "extra": (2,), "other_shape": (3, 4)}
    held = [TensorInfo(n, s, "bfloat16") for n, s in shapes.items()]
    source = Manifest.of(held, {0: [_whole(n, s) for n, s in shapes.items()]})
    shapes = {"both": (4,), "lacking": (2,), "other_shape": (4, 3), "lacking_too": (1,)}
    wanted = [TensorInfo(n, s, "bfloat16") for n, s in shapes.items()]
    destination = Manifest.of(wanted, {0: [_whole(n, s) for n, s in shapes.items()]})
    with pytest.raises(TensorMismatch) as refusal:
        build_plan(source, destination)
    assert refusal.value.violations == (
        "lacking: expected by the engine, found on no trainer rank",
        "other_shape (trainer rank 0): expected shape (4, 3), found (3, 4)",
        "lacking_too: expected by the engine, found on no trainer rank",
        "extra (trainer rank 0): expected by no engine rank, found shape (2,)",
    )
    assert all(line in str(refusal.value) for line in refusal.value.violations)


def test_a_hole_in_the_trainer_is_refused_on_every_rank() -> None:
    info = TensorInfo("w", (8, 4), "bfloat16")
    held = [_whole("w", (3, 4)), _whole("w", (4, 4), (4, 0))]  # row 3 is missing
    wanted = {0: [_whole("w", (4, 4))], 1: [_whole("w", (4, 4), (4, 0))], 2: [_whole("w", (8, 4))]}
    with pytest.raises(UnsupportedLayout) as refusal:
        build_plan(Manifest.of([info], {0: held}), Manifest.of([info], wanted))
    assert [line.split(";")[0] for line in refusal.value.violations] == [
        "w: engine rank 0 needs [0:4, 0:4]",
        "w: engine rank 2 needs [0:8, 0:4]",
    ]


@given(data=st.data())
def test_any_missing_box_is_refused(data: st.DataObject) -> None:
    infos = data.draw(layouts.plain_infos())
    source = data.draw(layouts.sides(infos))
    destination = data.draw(layouts.sides(infos))
    rank = data.draw(st.sampled_from([r for r, held in source.ranks.items() if held]))
    lost = source.ranks[rank].pop(data.draw(st.integers(0, len(source.ranks[rank]) - 1)))
    with pytest.raises(UnsupportedLayout) as refusal:
        build_plan(source.manifest(infos), destination.manifest(infos))
    assert all(line.startswith(f"{lost.tensor}: engine rank") for line in refusal.value.violations)


# --- in words -------------------------------------------------------------------------------------


@given(data=st.data())
def test_explain_counts_every_byte(data: st.DataObject) -> None:
    infos, source, destination = data.draw(joined("blockwise"))
    reason = "the loader computes what it stores"
    infos[0] = TensorInfo(infos[0].name, infos[0].shape, *_rest(infos[0]), misc=reason)
    plan = build_plan(source.manifest(layouts.as_source(infos)), destination.manifest(infos))
    text = explain(plan)
    payload = sum(c.weight_bytes + 4 * int(np.prod(c.scale_shape)) for c in plan.copies)
    assert text.splitlines()[0] == (
        f"{len(infos)} tensors in {len(plan.copies)} copies, {payload:,} bytes"
    )
    assert f"bulk: {len(infos) - 1} tensors; misc: 1" in text
    assert f"misc {infos[0].name}: {reason}" in text
    links = {(c.source_rank, c.destination_rank) for c in plan.copies}
    assert sum(line.startswith("link ") for line in text.splitlines()) == len(links)


def _rest(info: TensorInfo) -> tuple[str, Encoding, Formula | None]:
    return info.dtype, info.encoding, info.formula


# --- buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "blockwise"])
@given(data=st.data())
def test_buckets_hold_the_plan_in_order_and_to_the_byte(kind: str, data: st.DataObject) -> None:
    infos, source, destination = data.draw(joined(kind))
    plan = build_plan(source.manifest(layouts.as_source(infos)), destination.manifest(infos))
    limit = 16 * data.draw(st.integers(1, 8 if kind == "plain" else 8192))
    ids = layouts.element_ids(infos)
    read = layouts.filled(source, ids)
    whole, _ = layouts.carry_out(plan.copies, read, destination.sizes)
    strips = []
    for rank in destination.ranks:
        buckets = fill_buckets(plan.to_rank(rank), limit)
        assert [b.index for b in buckets] == list(range(len(buckets)))
        for bucket in buckets:
            _check_layout(bucket, limit)
            strips += [part.copy for part in bucket.parts]
        routes = [b.source_rank for b in buckets]
        assert routes == sorted(routes)
    in_strips, writes = layouts.carry_out(strips, read, destination.sizes)
    for name, storage in whole.items():
        assert np.array_equal(in_strips[name], storage)
        assert np.array_equal(writes[name], (storage >= 0).astype(int))


def _check_layout(bucket, limit: int) -> None:
    """Parts lie one after another, aligned, padded by less than 16 bytes, and fill the bucket."""
    position = 0
    for part in bucket.parts:
        copy = part.copy
        assert (copy.source_rank, copy.destination_rank) == (
            bucket.source_rank,
            bucket.destination_rank,
        )
        assert part.offset == position
        position = -(-(position + copy.weight_bytes) // 16) * 16
        if copy.encoding is Encoding.BLOCKWISE:
            assert part.scale_offset == position
            assert all(a % 128 == 0 for a in copy.start)
            position = -(-(position + 4 * int(np.prod(copy.scale_shape))) // 16) * 16
        else:
            assert part.scale_offset == -1
    assert bucket.nbytes == position
    first, *others = bucket.parts
    strip = 128 if first.copy.encoding is Encoding.BLOCKWISE else 1
    uncuttable = not first.copy.shape or first.copy.shape[0] <= strip
    assert bucket.nbytes <= limit or (not others and uncuttable)


def test_a_large_copy_is_cut_at_multiples_of_128_rows() -> None:
    info = TensorInfo("w", (576, 256), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
    box = _whole("w", (576, 256))
    scaled = Box("w", box.start, box.shape, box.at, Placement("s", 0, (2, 1)))
    plan = build_plan(
        Manifest.of(layouts.as_source([info]), {0: [box]}), Manifest.of([info], {0: [scaled]})
    )
    buckets = fill_buckets(plan.copies, 128 * 256 + 16)
    shapes = [part.copy.shape for bucket in buckets for part in bucket.parts]
    assert shapes == [(128, 256)] * 4 + [(64, 256)]
    scales = [part.copy.scale_at.offset for bucket in buckets for part in bucket.parts]
    assert scales == [0, 2, 4, 6, 8]
    assert [bucket.nbytes for bucket in buckets] == [128 * 256 + 16] * 4 + [64 * 256 + 16]
