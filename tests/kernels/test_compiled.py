"""What the compiler makes of the kernels for sm_90 and sm_100: read without a GPU.

The interpreter cannot show an approximate division, a lost vector access or a spill; this can.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from fp8sync_kernels.descriptor import COUNTED, CUT, DIVISION
from fp8sync_kernels.descriptor import Path as KernelPath
from fp8sync_kernels.launch import compile_options

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler, not the interpreter"
)

BULK = KernelPath.WIDE_BF16
COPIES = KernelPath.COPY_16 | KernelPath.COPY_4 | KernelPath.COPY_1 | COUNTED
BUCKET = BULK | KernelPath.ANY_BF16 | COPIES | KernelPath.CAST
TABLES = {
    "bf16": BULK,
    "bf16 cut": BULK | CUT,
    "bucket": BUCKET,
    "bf16 fp32": BULK | DIVISION,
    "one row fp32": BULK | DIVISION,
    "bf16 cut fp32": BULK | DIVISION | CUT,
    "fp16 cut fp32": KernelPath.WIDE_FP16 | DIVISION | CUT,
    "bucket fp32": BUCKET | DIVISION | CUT,
    "two sources cut fp32": BULK | KernelPath.WIDE_FP16 | KernelPath.CAST | DIVISION | CUT,
    "all sources cut fp32": sum(KernelPath) | DIVISION | CUT | COUNTED,
    "fp32 source": KernelPath.WIDE_FP32,
    "fp32 source cut fp32": KernelPath.WIDE_FP32 | DIVISION | CUT,
    "codes": KernelPath.WIDE_CODES,
    "codes cut": KernelPath.WIDE_CODES | CUT,
    "bucket with codes": BUCKET ^ BULK | KernelPath.WIDE_CODES | CUT,
    "copies": KernelPath.COPY_16,
    "copies that count": KernelPath.COPY_16 | COUNTED,
}
LIMITS = {
    "fp32": 168,
    "two": 168,
    "one row fp32": 104,
    "all": 248,
    "codes": 128,
    "codes cut": 128,
    "bucket with codes": 128,
}

# Loads and stores of 16 bytes, if a thread takes its share of a tile in no smaller pieces.
WHOLE_TILE = {
    "bf16": (16, 8),
    "one row fp32": (16, 8),
    "fp32 source": (32, 8),
    "codes": (16, 0),
    "copies": (8, 8),
}


@pytest.fixture(scope="module", params=[90, 100], ids=["sm_90", "sm_100"])
def compiled(request):
    return {
        name: build(int(paths), request.param, name.startswith("one row"))
        for name, paths in TABLES.items()
    }


def build(paths, capability, one_row):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fp8sync_kernels.gpu.bucket import bucket_kernel

    block_row = "constexpr" if one_row else "*i32"
    types = {"table": "*i64", "block_row": block_row, "digests": "*i64", "nonfinite": "*i64"}
    signature = {**types, "blocks": "i32", "PATHS": "constexpr", "LOOP": "constexpr"}
    constants = {"PATHS": paths, "LOOP": False, **({"block_row": None} if one_row else {})}
    source = ASTSource(bucket_kernel, signature, constants)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=compile_options(paths, one_row))


def resources(kernel):
    """(registers, bytes of stack) of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def test_casts_and_divisions(compiled):
    for name, kernel in compiled.items():
        ptx = kernel.asm["ptx"]
        assert "div.full" not in ptx
        assert "div.approx" not in ptx
        assert "ex2.approx" not in ptx
        assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == (not name.startswith("copies"))
        assert ("div.rn.f32" in ptx) == name.endswith(" fp32")


def test_vector_access(compiled):
    for name, kernel in compiled.items():
        ptx = kernel.asm["ptx"]
        assert "ld.global.v4.b32" in ptx, name
        assert ("st.global.v4.b32" in ptx) == (not name.startswith("codes")), name  # only digested
        assert "st.global.v2" not in ptx, name
        if name in WHOLE_TILE:
            assert (
                tuple(ptx.count(f"{way}.global.v4.b32") for way in ("ld", "st")) == WHOLE_TILE[name]
            ), name


def test_no_spills_and_as_many_programs_as_planned(compiled):
    for name, kernel in compiled.items():
        registers, stack = resources(kernel)
        assert stack == 0, f"{name}: {stack} bytes of stack"
        assert registers <= LIMITS.get(name.partition(" source")[0], 96), name
