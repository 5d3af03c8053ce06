"""The grouped kernel under Triton's interpreter, against its reference, byte for byte."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from fp8sync_kernels.descriptor import COUNTED, CUT, DIVISION, Path
from fp8sync_kernels.job import Part, copy
from fp8sync_kernels.launch import launch_kernel
from fp8sync_kernels.reference.table import run_table_reference
from fp8sync_kernels.table import build_table
from tests.kernels.cases import Arena, check, run
from tests.kernels.interpreter.cast_kernel import cast_kernel
from tests.kernels.properties import *  # noqa: F403  (tests that are collected here)
from tests.kernels.scenarios import scenarios

SCENARIOS = scenarios()


def test_cast_patch():
    """The conversions that the interpreter gets wrong by itself."""
    x = torch.tensor([1.96875, 1.0625, 464.0, 1e9, float("nan"), -float("nan"), 31.9, 2e-10])
    codes = torch.zeros(8, dtype=torch.uint8)
    cast_kernel[(1,)](x, codes, 8, tl.uint8, tl.float8e4nv)
    assert codes.tolist() == [0x40, 0x38, 0x7E, 0x7E, 0x7F, 0x7F, 0x60, 0x00]
    x = torch.tensor([1 + 2**-8 + 2**-16, 1 + 2**-8, 1 + 3 * 2**-8, -1e-39])
    halves = torch.zeros(4, dtype=torch.int16)
    cast_kernel[(1,)](x, halves, 4, tl.int16, tl.bfloat16)
    assert halves.tolist() == x.bfloat16().view(torch.int16).tolist()
    assert halves[:3].tolist() == [0x3F81, 0x3F80, 0x3F82]
    x = torch.tensor([0x0001, 0x007F], dtype=torch.int16).view(torch.bfloat16)
    words = torch.zeros(2, dtype=torch.int32)
    cast_kernel[(1,)](x, words, 2, tl.int32, tl.float32)
    assert words.tolist() == [0x00010000, 0x007F0000]


@pytest.mark.parametrize("name", SCENARIOS)
def test_same_bytes_as_the_reference(name):
    _, digests, nonfinite = check(SCENARIOS[name])
    if name.startswith("nonfinite"):
        assert nonfinite.tolist() == [0, 0, 0, 4, 0, 0, 0, 0]
    if name.startswith("copy"):
        assert digests[0] == digests[1]
        assert nonfinite.count_nonzero() == 0
    if name == "codes-nan":
        assert nonfinite.tolist() == [0, 0, 0, 0, 0, 64 * 1024, 0, 0]
    elif name.startswith("codes"):
        assert digests[0] == digests[1]
        assert nonfinite[0] == nonfinite[1] > 0
        assert nonfinite[2:].count_nonzero() == 0


def test_parts_of_a_table_find_their_blocks():
    sizes = (64, 5000, 0, 3 * 32768 + 100, 40000, 16)
    sources = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes]
    whole = build_table([copy(x, None, Part(n)) for n, x in enumerate(sources)], "cpu")
    expected, found = torch.zeros(2, len(sizes), dtype=torch.int64)
    run_table_reference(whole, expected, None)
    for start, stop in ((0, 1), (1, 3), (3, 5), (5, 6)):
        launch_kernel(whole.part(start, stop), found[start:stop], None)
    assert found.tolist() == expected.tolist()
    assert expected.count_nonzero() == 5


def test_scenarios_take_every_path():
    taken = 0
    for make_jobs in SCENARIOS.values():
        taken |= build_table(make_jobs(Arena("cpu")), "cpu").paths
    assert taken == sum(Path) | DIVISION | CUT | COUNTED


def test_counters_may_be_absent():
    def launch_without(table, _digests, _nonfinite):
        launch_kernel(table, None, None)

    def jobs(arena):
        names = ("everything", "canonical-144", "canonical-131")
        return [job for name in names for job in SCENARIOS[name](arena)]

    with_counters, without = (run(jobs, launch)[0] for launch in (launch_kernel, launch_without))
    assert with_counters
    assert all(map(torch.equal, with_counters, without))


def test_fewer_programs_than_blocks_take_them_all():
    def launch_four(table, digests, nonfinite):
        assert table.blocks > 8
        launch_kernel(table, digests, nonfinite, programs=4)

    def jobs(arena):
        names = ("200x304-bfloat16-fp32", "canonical-144", "copy-33x1040")
        return [job for name in names for job in SCENARIOS[name](arena)]

    for ours, expected in zip(run(jobs, launch_four), run(jobs, run_table_reference), strict=True):
        assert all(map(torch.equal, ours, expected))
