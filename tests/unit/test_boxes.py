"""Rectangles against sets of points."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8sync.errors import TensorMismatch, UnsupportedLayout
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan.boxes import block_shape, misaligned_dim, overlap, overlapping, volume
from fp8sync.plan.coverage import check_all_held, check_all_used, remainder, union_volume


@st.composite
def rects(draw: st.DrawFn, dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start = draw(st.tuples(*[st.integers(0, 6)] * dims))
    return start, draw(st.tuples(*[st.integers(1, 5)] * dims))


def points(rect: tuple[tuple[int, ...], tuple[int, ...]]) -> set[tuple[int, ...]]:
    return set(product(*(range(a, a + n) for a, n in zip(*rect, strict=True))))


several = st.integers(0, 3).flatmap(lambda dims: st.lists(rects(dims), min_size=2, max_size=7))


@given(several)
def test_overlap_is_the_common_points(listed) -> None:
    for a, b in combinations(listed, 2):
        common = overlap(a, b)
        assert (points(common) if common else set()) == points(a) & points(b)
        assert overlap(b, a) == common
        assert volume(a) == len(points(a))


@given(several)
def test_overlapping_finds_every_pair_once(listed) -> None:
    wanted = {frozenset(p) for p in combinations(range(len(listed)), 2) if _meet(listed, *p)}
    found = [frozenset(pair) for pair in overlapping(listed)]
    assert len(found) == len(set(found))
    assert set(found) == wanted


def _meet(listed, i: int, j: int) -> bool:
    return bool(points(listed[i]) & points(listed[j]))


@given(several)
def test_union_volume_counts_points_once(listed) -> None:
    assert union_volume(listed) == len(set().union(*map(points, listed)))


def test_union_volume_of_nothing() -> None:
    assert union_volume([]) == 0


@pytest.mark.parametrize(
    ("start", "shape", "dim"),
    [
        ((0, 0), (576, 300), None),
        ((512, 256), (64, 44), None),  # both up to the tensor's ragged end
        ((512, 0), (63, 300), 0),
        ((64, 0), (64, 300), 0),
        ((0, 256), (128, 43), 1),
        ((128, 1), (128, 127), 1),
    ],
)
def test_misaligned_dim(start, shape, dim) -> None:
    assert misaligned_dim((start, shape), (576, 300)) == dim


def test_block_shape_rounds_up() -> None:
    assert block_shape((1, 128, 129, 576)) == (1, 1, 2, 5)


def test_partial_use_is_refused_for_every_tensor_at_once() -> None:
    """A loader that narrows would drop rows without a word."""
    infos = [TensorInfo(n, (8, 4), "bfloat16") for n in ("whole", "half", "none")]
    at = Placement("s", 0, (4, 1))
    ranks = {
        0: [Box("whole", (0, 0), (5, 4), at), Box("half", (0, 0), (4, 4), at)],
        1: [Box("whole", (4, 0), (4, 4), at), Box("half", (2, 0), (2, 4), at)],
    }
    with pytest.raises(TensorMismatch) as refusal:
        check_all_used(Manifest.of(infos, ranks))
    assert refusal.value.violations == (
        "half (all 2 engine ranks): expected to take all 32 elements of shape (8, 4), found 16 taken",
        "none (all 2 engine ranks): expected to take all 32 elements of shape (8, 4), found 0 taken",
    )


def test_full_use_is_accepted() -> None:
    info = TensorInfo("w", (8, 4), "bfloat16")
    at = Placement("s", 0, (4, 1))
    halves = {r: [Box("w", (4 * r, 0), (4, 4), at)] for r in (0, 1)}
    replicated = {r: [Box("w", (0, 0), (8, 4), at)] for r in (0, 1)}
    check_all_used(Manifest.of([info], halves))
    check_all_used(Manifest.of([info], replicated))


def test_holes_of_a_trainer_are_refused_and_replicas_cut_differently_are_not() -> None:
    infos = [TensorInfo(n, (8, 4), "bfloat16") for n in ("twice", "hole")]
    at = Placement("s", 0, (4, 1))
    ranks = {
        0: [Box("twice", (0, 0), (8, 4), at), Box("hole", (0, 0), (4, 4), at)],
        1: [Box("twice", (4, 0), (4, 4), at), Box("hole", (5, 0), (3, 4), at)],
    }
    with pytest.raises(UnsupportedLayout) as refusal:
        check_all_held(Manifest.of(infos, ranks))
    (fault,) = refusal.value.violations
    assert fault == "hole: expected 32 elements of [8, 4], found 28 on all trainer ranks together"


@given(rects(3), st.lists(rects(3), max_size=4))
def test_remainder_tiles_what_is_left(whole: Any, holes: list[Any]) -> None:
    found = [points(rect) for rect in remainder(whole, holes)]
    covered = set().union(*(points(hole) for hole in holes))
    assert set().union(*found) == points(whole) - covered
    assert sum(len(piece) for piece in found) == len(points(whole) - covered)
