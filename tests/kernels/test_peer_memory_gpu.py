"""One GPU's kernel writing straight into another GPU's memory, byte for byte."""

from __future__ import annotations

import pytest
import torch

from fp8sync_kernels.launch import run_table
from fp8sync_kernels.reference.table import run_table_reference
from fp8sync_kernels.table import build_table
from tests.kernels.cases import Arena, assert_same_bytes, hard, run
from tests.kernels.scenarios import everything, one, scenarios

pytestmark = pytest.mark.multigpu(2)
SCENARIOS = {
    name: jobs
    for name, jobs in scenarios().items()
    if name.startswith(("patterns", "200x304", "130x77", "given", "copy", "cast-float32", "amax"))
}


class PeerArena(Arena):
    """Inputs on the GPU that works, outputs on the other."""

    def output(self, *shape, **layout):
        here, self.device = self.device, torch.device("cuda", 1)
        try:
            return super().output(*shape, **layout)
        finally:
            self.device = here


@pytest.fixture(scope="module")
def worker():
    if not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("GPU 0 cannot address the memory of GPU 1")
    torch.ones(1, device="cuda:0").to("cuda:1")  # PyTorch enables access at its first peer copy
    return torch.device("cuda", 0)


def check_peer(make_jobs, worker):
    arena = PeerArena(worker)
    table = build_table(make_jobs(arena), worker)
    assert {memory.device.index for memory in arena.written} == {1}
    digests, nonfinite = torch.zeros(2, 8, dtype=torch.int64, device=worker)
    torch.cuda.synchronize(1)  # the poison is there before GPU 0 writes
    run_table(table, digests, nonfinite)
    torch.cuda.synchronize(worker)
    memories, expected_digests, expected_counts = run(make_jobs, run_table_reference)
    for number, (ours, expected) in enumerate(zip(arena.written, memories, strict=True)):
        assert_same_bytes(ours.cpu(), expected, f"output {number}")
    assert torch.equal(digests.cpu(), expected_digests)
    assert torch.equal(nonfinite.cpu(), expected_counts)


@pytest.mark.parametrize("name", SCENARIOS)
def test_same_bytes_in_the_other_gpu(name, worker):
    check_peer(SCENARIOS[name], worker)


def test_a_mixed_bucket_in_the_other_gpu(worker):
    check_peer(everything, worker)


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_many_whole_blocks_in_the_other_gpu(formula, worker):
    x = hard(2048, 4096) * torch.rand(2048, 1).bfloat16()
    check_peer(lambda arena: one(arena, x, formula), worker)
