"""Memory that others write: whose it is; what CUDA refuses is an error of fp8sync, and torch's next kernel runs."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from fp8sync.errors import Fp8SyncError
from fp8sync.transport.memory import MappedMemory, allocate, export_memory


def check_that_torch_goes_on(device: torch.device) -> None:
    assert torch.ones(8, device=device).sum().item() == 8


def test_a_process_of_the_same_number_is_another() -> None:
    """As in two containers of one host, whose addresses mean nothing to each other."""
    memory = allocate(64, torch.device("cpu"))
    own = export_memory(memory)
    assert own.reachable
    assert MappedMemory(own, memory.device).address == memory.data_ptr()
    assert own.process.startswith(f"{os.getpid()}/")
    assert not replace(own, process=f"{os.getpid()}/another").reachable


@pytest.mark.gpu
def test_what_cuda_refuses_is_not_left_to_torch() -> None:
    device = torch.device("cuda", 0)
    with pytest.raises(Fp8SyncError, match=r"cudaMalloc of \d+ bytes failed with CUDA error 2"):
        allocate(1 << 60, device)
    check_that_torch_goes_on(device)


@pytest.mark.gpu
def test_memory_that_torch_keeps_is_free() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    most = torch.cuda.mem_get_info(device)[0] * 3 // 4
    torch.empty(most, dtype=torch.uint8, device=device)
    assert torch.cuda.mem_get_info(device)[0] < most
    assert allocate(most, device).numel() == most


@pytest.mark.multigpu(2)
def test_access_that_is_enabled_already() -> None:
    """A link's second worker in this process, or torch's own peer copies, came first."""
    there, here = torch.device("cuda", 1), torch.device("cuda", 0)
    memory = allocate(512, there)
    for _ in range(2):
        MappedMemory(export_memory(memory), here).close()
        check_that_torch_goes_on(here)
