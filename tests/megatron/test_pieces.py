"""The arithmetic of layouts, which needs no Megatron."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan.coverage import check_tiling
from fp8sync.recipe import Encoding, Formula
from fp8sync.sending.golden import pieces_of
from fp8sync.sources.megatron.boxes import boxes_of
from fp8sync.sources.megatron.held import Held, held
from fp8sync.sources.megatron.masters import Master, master_boxes, rectangles
from fp8sync.sources.megatron.pieces import Layout, Piece, Run, columns, concatenated, fused, rows
from tests.megatron import pairs


@settings(deadline=None)
@given(
    runs=st.lists(st.tuples(st.sampled_from(["a", "b", ""]), st.integers(0, 9)), min_size=1),
    count=st.integers(1, 4),
)
def test_shards_of_fused_runs_tile_their_tensors(runs: list, count: int) -> None:
    ends = {"a": 0, "b": 0, "": 0}
    listed = []
    for tensor, size in runs:
        listed.append(Run(tensor, ends[tensor], size))
        ends[tensor] += size
    listed.append(Run("", 0, -sum(ends.values()) % count))
    total = sum(run.count for run in listed)
    where = {}
    at = 0
    for run in listed:
        where |= {(run.tensor, run.first + i): at + i for i in range(run.count) if run.tensor}
        at += run.count
    found = {}
    for index in range(count):
        layout = fused(listed, (total // count, 2), (index, count))
        for piece in layout.pieces:
            for i in range(piece.shape[0]):
                found[piece.tensor, piece.start[0] + i] = (
                    total // count * index + piece.local[0] + i
                )
    assert found == where


def test_neighbouring_runs_become_one_piece() -> None:
    layout = fused([Run("a", 0, 2), Run("a", 2, 2), Run("b", 0, 4)], (8,), (0, 1))
    assert layout.pieces == (Piece("a", (0,), (0,), (4,)), Piece("b", (0,), (4,), (4,)))


def test_padding_of_a_vocabulary_is_nobodys() -> None:
    assert rows("v", (64, 2), (2, 4), full_rows=130).pieces == (
        Piece("v", (128, 0), (0, 0), (2, 2)),
    )
    assert rows("v", (64, 2), (3, 4), full_rows=130) == Layout({"v": (130, 2)}, ())
    with pytest.raises(ValueError, match="expected 300 rows on all 4 ranks together, found 64"):
        rows("v", (64, 2), (3, 4), full_rows=300)


def test_a_bias_of_a_row_parallel_layer_is_whole() -> None:
    assert columns("b", (5,), (1, 4)).shapes == {"b": (5,)}


def test_an_odd_number_of_rows_is_not_gate_and_up() -> None:
    with pytest.raises(ValueError, match="5 rows cannot hold 2 shards"):
        concatenated(["g", "u"], (5, 2), (0, 1))


def test_scales_are_read_past_their_padding() -> None:
    codes = torch.zeros(256, 640, dtype=torch.float8_e4m3fn)
    scale_inv = torch.arange(16.0).view(2, 8)[:, :8]
    layout = concatenated(["g", "u"], (256, 640), (1, 2))
    _, up = boxes_of("w", layout, Held(codes, scale_inv))
    assert (up.scale_at, up.scale_origin) == (Placement("w_scale_inv", 8, (8, 1)), ())


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        (columns("w", (200, 128), (1, 2)), [(0, ())]),  # ragged, at both ends
        (rows("w", (192, 128), (0, 2)), [(0, ())]),
        (rows("w", (192, 128), (1, 2)), [(0, (0, 0))]),  # the second rank's blocks begin at row 192
        (concatenated(["g", "u"], (400, 128), (0, 1)), [(0, ()), (1, (72, 0))]),
    ],
)
def test_boxes_say_where_their_own_blocks_begin(layout: Layout, found: list[Any]) -> None:
    """Row of the first scale, and the box's first element within that block."""
    held = Held(torch.zeros(400, 128, dtype=torch.float8_e4m3fn), torch.zeros(4, 1))
    boxes = list(boxes_of("w", layout, held))
    assert [(b.scale_at and b.scale_at.offset, b.scale_origin) for b in boxes] == found


@settings(deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 6),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_run_of_elements_is_at_most_three_rectangles(rows, columns, ends) -> None:
    begin, end = sorted(round(e * rows * columns) for e in ends)
    found = list(rectangles((rows, columns), begin, end - begin))
    flat = torch.arange(rows * columns).view(rows, columns)
    parts = [flat[a : a + n, b : b + m].flatten() for (a, b), (n, m) in found]
    assert torch.cat([*parts, flat[:0, 0]]).tolist() == list(range(begin, end))
    assert len(found) <= 3


def test_a_master_is_cut_by_pieces_and_by_its_owner() -> None:
    layout = concatenated(["g", "u"], (4, 4), (1, 2))
    master = Master(6, torch.arange(6.0, 15.0))
    boxes = list(master_boxes("w", layout, (4, 4), master))
    for found in boxes:
        at = found.at
        cut = master.tensor.as_strided(found.shape, at.strides, at.offset)
        first = (found.start[0] - 2 + (2 if found.tensor == "u" else 0)) * 4 + found.start[1]
        assert cut[0, 0] == first
    assert sum(found.shape[0] * found.shape[1] for found in boxes) == 9


def box(start: int, size: int) -> Box:
    return Box("t", (start,), (size,), Placement("t", 0, (1,)))


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ({0: [box(0, 4)], 1: [box(4, 4)], 2: [box(4, 4)]}, None),
        ({0: [box(0, 4)], 1: [box(5, 3)]}, r"expected 8 elements of \[8\], found 7"),
        ({0: [box(0, 5)], 1: [box(4, 4)]}, r"found \[0:5\] and \[4:8\], which overlap"),
    ],
)
def test_tiling(boxes: dict[int, list[Box]], said: str | None) -> None:
    manifest = Manifest.of([TensorInfo("t", (8,), "bfloat16")], boxes)
    if said is None:
        check_tiling(manifest)
        return
    with pytest.raises(UnsupportedLayout, match=said):
        check_tiling(manifest)


@pytest.mark.parametrize("grid", [(2, 3), (2, 4), (1, 3), (3, 4), (2, 2), (2, 8)])
def test_scales_of_blocks_are_padded_in_their_columns_alone(grid: tuple[int, int]) -> None:
    """More would be scales of other blocks, such as those of two shards one below the other."""
    parameter: Any = torch.nn.Parameter(torch.zeros(256, 384))
    pairs.make_pair(parameter, Formula.POW2, rowwise_scale_inv=torch.ones(grid))
    if grid in ((2, 3), (2, 4)):
        assert held(parameter).scale_inv is not None
        return
    with pytest.raises(
        ValueError, match=r"expected scale_inv torch\.float32 \[2, 3\], or .* fours"
    ):
        held(parameter)


def test_golden_refuses_pairs_whose_blocks_are_not_the_tensors() -> None:
    """The up half of a parameter whose gate ends within a block: the box itself cuts none."""
    info = TensorInfo("up", (192, 128), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
    parameter = Held(torch.empty(384, 128).to(torch.float8_e4m3fn), torch.empty(3, 4), Formula.POW2)
    up = Layout({"up": (192, 128)}, (Piece("up", (0, 0), (192, 0), (192, 128)),))
    held = Manifest.of([info], {0: list(boxes_of("fc1.weight", up, parameter))})
    with pytest.raises(UnsupportedLayout, match="up: the trainer's blocks are not the tensor's"):
        pieces_of(held)
