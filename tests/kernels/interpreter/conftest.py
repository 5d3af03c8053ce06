"""Corrects the casts of Triton's interpreter for the tests in this folder.

The interpreter of Triton 3.6 to 3.9 converts to and from FP8 wrongly (no saturation, lost carries)
and truncates fp32 to bf16. PyTorch's conversions are right, so they take its place; the kernels
under test are unchanged. With an interpreter that is right this is harmless.

These tests need TRITON_INTERPRET=1 before Triton is imported, which other tests must not have:
tests/kernels/test_interpreter.py runs this folder in a process of its own.
"""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def exact_casts():
    if not INTERPRETED:
        yield
        return
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    torch_of = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    original = interpreter._convert_float

    def convert(values, input_dtype, output_dtype, rounding_mode):
        toward_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if input_dtype not in torch_of or output_dtype not in torch_of or toward_zero:
            return original(values, input_dtype, output_dtype, rounding_mode)
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        x = torch.from_numpy(raw.copy()).view(torch_of[input_dtype])
        if output_dtype == tl.float8e4nv:
            x = x.float().clamp(-448, 448)  # torch 2.8 does not saturate, as hardware and 2.13 do
        y = x.to(torch_of[output_dtype])
        if output_dtype == tl.float8e4nv:
            y = y.view(torch.uint8).masked_fill(x.isnan(), 0x7F)
        width = output_dtype.primitive_bitwidth
        out = y.view(torch.uint8).numpy().view(getattr(np, f"uint{width}"))
        return out.reshape(values.shape)

    interpreter._convert_float = convert
    yield
    interpreter._convert_float = original
