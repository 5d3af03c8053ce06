"""Which inner loop a table's builder chooses."""

from __future__ import annotations

import pytest
import torch

from fp8sync_kernels.descriptor import CUT, DIVISION, Path
from fp8sync_kernels.job import Matrix, Part, copy, quantize
from fp8sync_kernels.launch import run_table
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


@pytest.mark.parametrize(
    ("counters", "error", "found"),
    [
        (torch.zeros(4, dtype=torch.int64), ValueError, r"shape \(4,\) .* the table has 5 slots"),
        (torch.zeros(5, 2, dtype=torch.int64)[:, 0], ValueError, r"strides \(2,\)"),
        (torch.zeros(5, dtype=torch.int32), TypeError, "torch.int32 on cpu, expected torch.int64"),
        (
            torch.zeros(5, dtype=torch.int64, device="meta"),
            TypeError,
            "on meta, expected .* on cpu",
        ),
    ],
)
def test_counters_that_a_kernel_would_write_beside(counters, error, found):
    source, written = torch.ones(128), torch.zeros(128)
    table = build_table([copy(source, written, Part(slot=4))], "cpu")
    for given in ((counters, None), (None, counters)):
        with pytest.raises(error, match=found):
            run_table(table, *given)
    with pytest.raises(ValueError, match="0 programs"):
        run_table(table, None, None, programs=0)
    assert not written.any()


@pytest.mark.parametrize("name", ["x", "scale_inv", "amax"])
def test_addresses_between_elements_are_refused(name):
    places = {"x": 1 << 20, "scale_inv": 1 << 30, "amax": 1 << 31}
    places[name] += 1
    x = Matrix(places["x"], 128, 128, 128, torch.bfloat16)
    scale_inv, amax = (Matrix(places[n], 1, 1, 1, torch.float32) for n in ("scale_inv", "amax"))
    with pytest.raises(ValueError, match=rf"^{name} lies at {places[name]:#x}, no multiple of"):
        quantize(x, "pow2", None, scale_inv, amax=amax)
