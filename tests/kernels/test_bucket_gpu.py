"""The grouped kernel on a GPU against its reference on the CPU, byte for byte."""

from __future__ import annotations

import pytest
import torch

from fp8sync_kernels import quantize_blockwise
from fp8sync_kernels.formulas import FORMULAS
from fp8sync_kernels.job import Part, quantize
from fp8sync_kernels.launch import run_table
from fp8sync_kernels.ops import quantize_matrix
from fp8sync_kernels.reference.table import run_table_reference
from fp8sync_kernels.table import build_table
from tests.kernels.cases import Arena, check, hard, run
from tests.kernels.properties import *  # noqa: F403  (tests that are collected here)
from tests.kernels.scenarios import everything, one, scenarios

pytestmark = pytest.mark.gpu
SCENARIOS = scenarios()


@pytest.mark.parametrize("name", SCENARIOS)
def test_same_bytes_as_the_reference(name):
    check(SCENARIOS[name])


@pytest.mark.parametrize("name", ["everything", "patterns-pow2", "patterns-fp32"])
def test_the_reference_is_the_same_on_cuda(name):
    """IEEE in every step on both: PyTorch's tensor / number would differ here."""
    results = [run(SCENARIOS[name], run_table_reference, device) for device in ("cpu", "cuda")]
    for on_cpu, on_cuda in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(on_cpu, on_cuda)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("formula", FORMULAS)
def test_many_blocks(formula):
    """Several hundred blocks of random scale, so that programs run at once and in any order."""
    x = hard(3000, 4112) * torch.rand(3000, 1).bfloat16()
    for programs in (None, 264):

        def runner(table, digests, nonfinite, programs=programs):
            run_table(table, digests, nonfinite, programs=programs)

        got = run(lambda arena: one(arena, x, formula), runner, "cuda")
        expected = run(lambda arena: one(arena, x, formula), run_table_reference)
        assert all(map(torch.equal, got[0], expected[0]))
        assert torch.equal(got[1], expected[1])


def test_cuda_graph_replay():
    """A captured launch writes everything anew at each replay."""
    device = torch.device("cuda")
    arena = Arena(device)
    table = build_table(everything(arena), device)
    counters = [torch.zeros(8, dtype=torch.int64, device=device) for _ in range(2)]
    run_table(table, *counters)
    expected = [memory.clone() for memory in arena.written]
    first = counters[0].clone()
    for memory in (*arena.written, *counters):
        memory.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counters[0].zero_()
        run_table(table, *counters)
    for _ in range(2):
        graph.replay()
    assert torch.equal(counters[0], first)
    for ours, before in zip(arena.written, expected, strict=True):
        written = before != 0xA5
        assert torch.equal(ours[written], before[written])


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_operator_is_compiled_in_one_piece(formula):
    """Also of a transposed matrix, whose rows are not adjacent."""
    x = hard(200, 272)
    compiled = torch.compile(quantize_matrix, backend="aot_eager", fullgraph=True)
    for source in (x, x.T):
        found = compiled(source.cuda(), formula)
        for ours, expected in zip(found, quantize_blockwise(source, formula), strict=True):
            assert torch.equal(ours.cpu().float(), expected.float())


def test_a_launch_does_not_synchronize():
    arena = Arena("cuda")
    table = build_table(everything(arena), "cuda")
    counters = [torch.zeros(8, dtype=torch.int64, device="cuda") for _ in range(2)]
    run_table(table, *counters)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_table(table, *counters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_digest_sees_a_swapped_block():
    x = torch.randn(256, 256).bfloat16()
    swapped = torch.cat([x[128:], x[:128]])
    digests = []
    for source in (x, swapped):

        def jobs(arena, source=source):
            weight = arena.output(256, 256)
            return [quantize(arena.input(source), "pow2", weight, None, Part())]

        digests.append(run(jobs, run_table, "cuda")[1][0])
    assert digests[0] != digests[1]
