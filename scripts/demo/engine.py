"""The engine: a real vLLM in a process of its own, started on dummy weights."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8sync.engines.vllm import probe
from scripts.demo.models import MAX_LENGTH, VOCABULARY, write_engine_config

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def start_engine(config: PretrainedConfig, *, fp8: bool, seed: int) -> Any:
    """Starts a vLLM with dummy weights that takes weights through the backend `fp8sync`.

    Args:
        config: the model to serve.
        fp8: blockwise-FP8 weights, else BF16.
        seed: of the engine.

    Returns:
        The `vllm.LLM`, to be ended by `probe.stop_engine`.
    """
    os.environ.update(_ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="fp8sync-demo-") as directory:
        write_engine_config(config, Path(directory), fp8=fp8)
        options = {"load_format": "dummy", "max_model_len": MAX_LENGTH, "max_num_seqs": 16}
        return probe.start_engine(Path(directory), VOCABULARY, seed=seed, **options)


def log_probabilities(llm: Any, windows: torch.Tensor) -> torch.Tensor:
    """What the engine says of every next byte: float32 [rows, length - 1, vocabulary]."""
    return probe.log_probabilities(llm, windows, VOCABULARY)


def generate(llm: Any, prompt: list[int], tokens: int, seed: int) -> list[int]:
    """Continues a prompt; the same seed and weights give the same continuation.

    Returns:
        The new token ids, without the prompt.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=tokens, temperature=0.7, seed=seed, ignore_eos=True, detokenize=False
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
    return list(output.outputs[0].token_ids)
