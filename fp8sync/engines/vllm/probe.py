"""Engines to measure: started from a config.json alone or a checkpoint, and asked for distributions."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.engines.vllm.environment import without_torchrun

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "fp8_is_supported",
    "log_probabilities",
    "placement",
    "sample",
    "settings",
    "start_engine",
    "stop_engine",
]


def fp8_is_supported() -> bool:
    """Whether vLLM's blockwise-FP8 kernels run here: on Hopper or newer, or on AMX tiles."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 9)
    return bool(torch.cpu._is_amx_tile_supported())


def start_engine(directory: Path, vocabulary: int, **options: Any) -> Any:
    """Start a `vllm.LLM`, in a process of its own, that takes weights through the backend `fp8sync`.

    Args:
        directory: config.json and, unless `load_format="dummy"`, weights.
        vocabulary: how many log-probabilities may be asked for.
        options: more of `vllm.LLM`.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with without_torchrun():
        from vllm import LLM, envs

        envs.disable_envs_cache()  # an engine started earlier in this process has frozen them
        return LLM(**settings(directory, vocabulary, **options), disable_log_stats=True)


def settings(directory: Path, vocabulary: int, **options: Any) -> dict[str, Any]:
    """Return options of an engine, for `vllm.LLM` and `vllm serve`."""
    made = {
        "model": str(directory),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_logprobs": vocabulary,
        "weight_transfer_config": {"backend": "fp8sync"},
        # By default vLLM takes most of the memory there is, and a trainer may be on the same GPU. With the
        # cache's size given, the share of the GPU is only compared with what is free at the start.
        "kv_cache_memory_bytes": 1 << 30,
        "gpu_memory_utilization": 0.1,
    }
    return made | options


def placement(workers: int, trainers: int = 0) -> dict[str, str]:
    """Return variables that give each worker of an engine a device of its own, to set before it starts.

    Args:
        workers: of the engine.
        trainers: ranks on this node, which have the first GPUs; GPUs are shared if they are too few.
    """
    if torch.cuda.is_available():
        gpus = [str(gpu) for gpu in range(torch.cuda.device_count())]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",")
        own = visible[trainers : trainers + workers]
        return {"CUDA_VISIBLE_DEVICES": ",".join(own)} if len(own) == workers else {}
    # vLLM gives each worker a NUMA node, and refuses to start if these are too few.
    cores = sorted(os.sched_getaffinity(0))
    bound = "|".join(str(cores[worker % len(cores)]) for worker in range(workers))
    return {} if workers == 1 else {"VLLM_CPU_OMP_THREADS_BIND": bound}


def stop_engine(llm: Any) -> None:
    """End an engine's processes."""
    # It needs about as long as vLLM's own 5 s, after which it would be killed and leave warnings.
    llm.llm_engine.engine_core.shutdown(timeout=30)
    gc.collect()


def log_probabilities(llm: Any, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Ask the engine for the distribution of every next token.

    Args:
        llm: the engine.
        tokens: int64 [rows, length].
        vocabulary: of the model.

    Returns:
        Natural logarithms, float32 [rows, length - 1, vocabulary]; position p is the distribution
        of tokens[:, p + 1].
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=1, prompt_logprobs=vocabulary, flat_logprobs=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    return torch.stack([_dense(output.prompt_logprobs, vocabulary) for output in outputs])


def sample(llm: Any, prompts: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Let the engine continue prompts: int64 [rows, prompt length + count]."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=count, temperature=1.0, seed=seed, ignore_eos=True, detokenize=False
    )
    requests = [{"prompt_token_ids": row} for row in prompts.tolist()]
    outputs = llm.generate(requests, parameters, use_tqdm=False)
    rows = [list(output.outputs[0].token_ids) for output in outputs]
    return torch.cat([prompts, torch.tensor(rows)], dim=1)


def _dense(flat: Any, vocabulary: int) -> torch.Tensor:
    """Spread vLLM's flat lists over [positions - 1, vocabulary]; the first position has none."""
    counts = torch.tensor(flat.end_indices) - torch.tensor(flat.start_indices)
    positions = torch.repeat_interleave(torch.arange(len(counts)), counts)
    dense = torch.full((len(counts), vocabulary), -torch.inf, dtype=torch.float32)
    dense[positions, torch.tensor(flat.token_ids)] = torch.tensor(
        flat.logprobs, dtype=torch.float32
    )
    return dense[1:]
