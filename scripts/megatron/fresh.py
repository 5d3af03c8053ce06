"""Load a directory in a vLLM of its own, and save its log-probabilities: `python -m scripts.megatron.fresh DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.engines import world

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    llm = world.start_engine(folder)
    torch.save(world.logprobs(llm), folder / "logprobs.pt")
