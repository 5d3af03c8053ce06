"""Which inner loop a table's builder chooses."""

from __future__ import annotations

import pytest
import torch

from fp8sync_kernels.descriptor import CUT, DIVISION, Path
from fp8sync_kernels.job import Matrix, Part, cast, copy, partial_amax, quantize
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


def test_rows_too_long_for_columns_of_32_bits():
    """A column's first byte, in a row of 2 GiB, and a lone row within its block, far from the others."""
    assert paths_of(1, 1 << 24, 1 << 24) == Path.WIDE_BF16 | CUT
    assert paths_of(1, 1 << 30, 1 << 30) == Path.ANY_BF16
    assert paths_of(1, 128, 1 << 30, origin=(5, 0)) == Path.ANY_BF16


@pytest.mark.parametrize(
    ("part", "found"),
    [
        (Part(pitch=255), "rows of 256 bytes would be digested 255 bytes apart"),
        (Part(scale_pitch=4), "2 scales would not fit into their pitch"),
        (Part(pitch=300), "from byte 65536, among the codes"),
        (Part(base=64, scale_base=60), "from byte 60, among the codes"),
        (Part(scale_base=6), "multiples of 4 bytes"),
        (Part(scale_base=-4), "must not be negative"),
        (Part(slot=-1), "must not be negative"),
    ],
)
def test_digest_positions_that_overlap_are_refused(part, found):
    x, weight = torch.zeros(256, 256), torch.zeros(256, 256, dtype=torch.uint8)
    with pytest.raises(ValueError, match=found):
        build_table([quantize(x, "pow2", weight, torch.zeros(2, 2), part)], "cpu")


def test_what_is_no_rectangle_is_refused_by_its_name():
    x, codes = torch.zeros(128, 128), torch.zeros(128, 128, dtype=torch.uint8)
    for name, job in (
        ("x", lambda: quantize(x.T[:, :64], "pow2", codes[:, :64], None)),
        ("weight", lambda: quantize(x, "pow2", codes.T, None)),
        ("amax", lambda: partial_amax(x, torch.zeros(()))),
        ("source", lambda: copy(x.view(2, 64, 128), None)),
        ("destination", lambda: cast(x, x.bfloat16().T)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected 2-D with unit inner stride"):
            job()


def test_written_rows_that_overlap_are_refused():
    """Which of the programs that write an element wrote it last is chance."""
    x, codes = torch.zeros(256, 256), torch.zeros(256, 256, dtype=torch.uint8)
    row, scales = torch.zeros(1, 256).expand(256, 256), torch.zeros(1, 2).expand(2, 2)
    for name, job in (
        ("destination", lambda: copy(x, row)),
        ("destination", lambda: cast(x, row)),
        ("weight", lambda: quantize(x, "pow2", codes.as_strided((256, 256), (255, 1)), None)),
        ("scale_inv", lambda: quantize(x, "pow2", codes, scales)),
        ("amax", lambda: partial_amax(x, scales)),
    ):
        with pytest.raises(ValueError, match=f"^{name} has rows of .* they overlap"):
            job()
    assert quantize(row, "pow2", codes, None, amax=scales).source.stride == 0


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


def test_parts_of_a_table_do_what_the_whole_does():
    sizes = (64, 5000, 0, 3 * 32768 + 100, 16)
    sources = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes]
    whole = build_table([copy(x, None, Part(n)) for n, x in enumerate(sources)], "cpu")
    expected, found = torch.zeros(2, len(sizes), dtype=torch.int64)
    run_table(whole, expected, None)
    for start, stop in ((0, 1), (1, 4), (4, 4), (4, 5)):
        part = whole.part(start, stop)
        assert (part.paths, part.slots) == (whole.paths, stop - start)
        run_table(part, found[start:stop], None)
    assert found.tolist() == expected.tolist()
    assert expected.count_nonzero() == 4


def test_a_table_whose_slots_are_out_of_order_has_no_parts():
    x = torch.zeros(64)
    with pytest.raises(ValueError, match="in the order of their slots"):
        build_table([copy(x, None, Part(1)), copy(x, None, Part(0))], "cpu").part(0, 1)
