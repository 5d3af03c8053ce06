"""What the kernel tests share: memory to work in, hard inputs, and byte-exact comparison."""

from __future__ import annotations

import os

import torch

from fp8sync_kernels.launch import launch_kernel, run_table
from fp8sync_kernels.reference.table import run_table_reference
from fp8sync_kernels.table import build_table

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
POISON = 0xA5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
KERNEL = launch_kernel if INTERPRETED else run_table


class Arena:
    """Input and output memory of one run; outputs begin poisoned so that stray writes show."""

    def __init__(self, device):
        self.device = device
        self.kept = []
        self.written = []

    def input(self, tensor):
        """The same values and strides on the arena's device."""
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        whole = tensor.as_strided((size,), (1,), 0).to(self.device)
        moved = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        self.kept.append(moved)
        return moved

    def output(self, rows, cols, dtype=torch.uint8, stride=None, offset=0):
        """Poisoned memory seen as ``[rows, cols]``; stride in elements, offset in bytes."""
        stride = cols if stride is None else stride
        size = offset + rows * stride * dtype.itemsize + 64
        memory = torch.full((size,), POISON, dtype=torch.uint8, device=self.device)
        self.written.append(memory)
        end = offset + rows * stride * dtype.itemsize
        return memory[offset:end].view(dtype).view(rows, stride)[:, :cols]


def run(make_jobs, runner, device="cpu", slots=8):
    """(output memories, digests, counts) of the jobs that ``make_jobs(arena)`` lists."""
    arena = Arena(device)
    table = build_table(make_jobs(arena), device)
    digests = torch.zeros(slots, dtype=torch.int64, device=device)
    nonfinite = torch.zeros(slots, dtype=torch.int64, device=device)
    runner(table, digests, nonfinite)
    return [memory.cpu() for memory in arena.written], digests.cpu(), nonfinite.cpu()


def check(make_jobs):
    """The kernel (on a GPU or interpreted) and the reference on the CPU write the same; returns it."""
    got = run(make_jobs, KERNEL, DEVICE)
    expected = run(make_jobs, run_table_reference)
    for number, (ours, reference) in enumerate(zip(got[0], expected[0], strict=True)):
        assert_same_bytes(ours, reference, f"output {number}")
    assert got[1].tolist() == expected[1].tolist(), "digests"
    assert got[2].tolist() == expected[2].tolist(), "nonfinite counts"
    return got


def assert_same_bytes(ours, reference, label):
    """Fail with the first differing byte."""
    wrong = (ours.view(torch.uint8) != reference.view(torch.uint8)).flatten()
    if wrong.any():
        at = int(wrong.int().argmax())
        left = int(ours.view(torch.uint8).flatten()[at])
        right = int(reference.view(torch.uint8).flatten()[at])
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} bytes differ, first at {at}: "
            f"{left:#x} instead of {right:#x}"
        )


def all_bf16_patterns():
    """Every bf16 bit pattern once, ``[256, 256]``: NaN, infinities, denormals and both zeros."""
    return (
        torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    )


def hard(rows, cols, dtype=torch.bfloat16, seed=0):
    """Weights whose blocks differ by kind: usual, zeros, tiny, huge, denormal, outliers, ±0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    kinds = (1.0, 0.02, 0.0, 1e-5, 1e4, 1e-38, -0.0, 1e-30)
    if dtype == torch.float16:
        kinds = (1.0, 0.02, 0.0, 1e-5, 1e4, 6e-8, -0.0, 1e-4)
    for i in range(0, rows, 128):
        for j in range(0, cols, 128):
            kind = (i // 128 * 3 + j // 128 + seed) % len(kinds)
            x[i : i + 128, j : j + 128] *= kinds[kind]
    return x.to(dtype)


def with_nonfinite(x):
    """A copy with NaN of both signs and both infinities in different blocks."""
    x = x.clone()
    x[0, 0] = float("nan")
    x[-1, -1] = float("inf")
    x[-1, 0] = -float("inf")
    x[x.shape[0] // 2, x.shape[1] // 2] = -float("nan")
    return x
