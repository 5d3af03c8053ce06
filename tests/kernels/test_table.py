"""Which inner loop a table's builder chooses."""

from __future__ import annotations

import pytest
import torch

from fp8sync_kernels.descriptor import CUT, DIVISION, Path
from fp8sync_kernels.job import Matrix, quantize
from fp8sync_kernels.table import build_table


def paths_of(rows, cols, stride, formula="pow2", origin=(0, 0)):
    x = Matrix(1 << 20, rows, cols, stride, torch.bfloat16)
    weight = Matrix(1 << 30, rows, cols, cols, torch.uint8)
    return build_table([quantize(x, formula, weight, None, origin=origin)], "cpu").paths


def test_whole_blocks_need_no_masks():
    assert paths_of(256, 384, 384) == Path.WIDE_BF16
    assert paths_of(256, 384, 384, "fp32") == Path.WIDE_BF16 | DIVISION


@pytest.mark.parametrize(("rows", "cols"), [(250, 384), (256, 400)])
def test_ragged_edges_are_masked(rows, cols):
    assert paths_of(rows, cols, cols) == Path.WIDE_BF16 | CUT


def test_an_origin_is_masked():
    assert paths_of(256, 384, 384, origin=(64, 16)) == Path.WIDE_BF16 | CUT


def test_rows_too_far_apart_for_positions_of_32_bits():
    """127 rows of 64 MiB pass 2^31 words; the slow way counts in 64 bits."""
    assert paths_of(128, 128, (1 << 25) - 8) == Path.WIDE_BF16
    assert paths_of(128, 128, 1 << 25) == Path.ANY_BF16
