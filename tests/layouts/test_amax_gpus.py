"""Cut blocks between GPUs: amax by NCCL, bytes by the grouped kernel, equal to the whole tensor's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.multigpu(2)
def test_two_gpus_agree_on_cut_blocks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"}
    script = ["-m", "tests.layouts.amax_ranks"]
    done = subprocess.run(
        [*command, *script],
        check=False,
        cwd=ROOT,
        env=environment,
        timeout=180,
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr[-4000:])
    assert done.returncode == 0
    assert done.stdout.count("values agreed") == 2
