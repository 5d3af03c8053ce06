"""The engine: a real vLLM in a process of its own, started on dummy weights."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scripts.demo.models import MAX_LENGTH, VOCABULARY, write_engine_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ENVIRONMENT = {
    # The engine must be another process than the trainer, whatever vLLM's default is.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def fp8_is_supported() -> bool:
    """Whether vLLM's FP8 kernels run on this processor: they need AMX tiles."""
    return torch.cpu._is_amx_tile_supported()


def start_engine(config: PretrainedConfig, *, fp8: bool, seed: int) -> Any:
    """Starts a vLLM with dummy weights that takes weights through the backend `fp8sync`.

    Args:
        config: the model to serve.
        fp8: blockwise-FP8 weights, else BF16.
        seed: of the engine.

    Returns:
        The `vllm.LLM`, to be ended by `stop_engine`.
    """
    os.environ.update(_ENVIRONMENT)
    from vllm import LLM

    with tempfile.TemporaryDirectory(prefix="fp8sync-demo-") as directory:
        write_engine_config(config, Path(directory), fp8=fp8)
        return LLM(
            model=directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=MAX_LENGTH,
            max_num_seqs=16,
            max_logprobs=VOCABULARY,
            weight_transfer_config={"backend": "fp8sync"},
            disable_log_stats=True,
            seed=seed,
        )


def stop_engine(llm: Any) -> None:
    """Ends an engine's processes."""
    # It needs about as long as vLLM's own 5 s, after which it would be killed and leave warnings.
    llm.llm_engine.engine_core.shutdown(timeout=30)


def log_probabilities(llm: Any, windows: torch.Tensor) -> torch.Tensor:
    """What the engine says of every next byte.

    Args:
        llm: the engine.
        windows: token ids, int64 [rows, length].

    Returns:
        Natural logarithms, float32 [rows, length - 1, vocabulary]; position p is the distribution
        of windows[:, p + 1].
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=1, prompt_logprobs=VOCABULARY, flat_logprobs=True, detokenize=False
    )
    outputs = llm.generate(_prompts(windows.tolist()), parameters, use_tqdm=False)
    return torch.stack([_dense(output.prompt_logprobs) for output in outputs])


def generate(llm: Any, prompt: list[int], tokens: int, seed: int) -> list[int]:
    """Continues a prompt; the same seed and weights give the same continuation.

    Returns:
        The new token ids, without the prompt.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=tokens, temperature=0.7, seed=seed, ignore_eos=True, detokenize=False
    )
    (output,) = llm.generate(_prompts([prompt]), parameters, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def _prompts(rows: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": row} for row in rows]


def _dense(flat: Any) -> torch.Tensor:
    """Spreads vLLM's flat lists over [positions - 1, vocabulary]; the first position has none."""
    counts = torch.tensor(flat.end_indices) - torch.tensor(flat.start_indices)
    positions = torch.repeat_interleave(torch.arange(len(counts)), counts)
    dense = torch.full((len(counts), VOCABULARY), -torch.inf)
    dense[positions, torch.tensor(flat.token_ids)] = torch.tensor(flat.logprobs)
    return dense[1:]
