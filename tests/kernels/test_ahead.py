"""What is compiled ahead is what a launch looks up: shown without a GPU, up to where one is needed."""

from __future__ import annotations

import os

import pytest
import torch

from fp8sync_kernels import build_table, job
from fp8sync_kernels.launch import launch_kernel, warm_up

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler, not the interpreter"
)
DEVICE = 1000  # no machine has so many: what is compiled here is nobody else's


class Absent:
    """A driver of Hopper GPUs that are not there: says what to compile for, and loads nothing."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return DEVICE

    def get_current_stream(self, device):
        return 0


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_launch_finds_what_was_compiled_ahead(monkeypatch, rows, digests):
    from triton.runtime import driver

    from fp8sync_kernels.gpu.bucket import bucket_kernel

    monkeypatch.setattr(driver, "_active", Absent())
    table = build_table([job.copy(torch.zeros(64), None)] * rows, "cpu")
    assert warm_up(table, digests=digests, nonfinite=False).asm["cubin"]
    compiled = bucket_kernel.device_caches[DEVICE][0]
    before = set(compiled)
    counters = torch.zeros(4, dtype=torch.int64)
    for start in (0, 1):  # counters may lie at any multiple of 8
        with pytest.raises(AttributeError, match="launcher_cls"):  # found, and about to be loaded
            launch_kernel(table, counters[start:] if digests else None, None)
    assert set(compiled) == before
