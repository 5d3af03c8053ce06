"""Load a directory in a vLLM of its own, and save its log-probabilities: `fresh DIR TENSOR_PARALLEL`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.engines import world

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tensor_parallel = int(sys.argv[2])
    llm = world.start_engine(
        folder, tensor_parallel_size=tensor_parallel, multiprocess=tensor_parallel > 1
    )
    torch.save(world.logprobs(llm), folder / "logprobs.pt")
