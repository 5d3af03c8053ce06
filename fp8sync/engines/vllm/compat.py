"""Everything that differs between vLLM versions and platforms, by name; docs/architecture.md lists them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from fp8sync.recipe import Formula

if TYPE_CHECKING:
    import torch

__all__ = [
    "asleep",
    "begun",
    "caches_prefixes",
    "captures_full_graphs",
    "compiles_hooks",
    "derived_from",
    "engine_commit",
    "has_our_backend",
    "has_scaled_kv_cache",
    "holds_quantizable_weights",
    "init_request",
    "is_attention",
    "is_capturing",
    "is_mla",
    "keeps_first_experts",
    "kept_formula",
    "kernels_live_in_parameters",
    "kv_cache_method",
    "kv_transfer_config",
    "number_of_label",
    "pause",
    "reads_host_scales",
    "text_config",
    "unreached",
    "update_request",
    "weights_asleep",
    "worker_rank",
]


def init_request(info: dict[str, Any]) -> Any:
    """Return what AsyncLLM's `init_weight_transfer_engine` takes."""
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

    return WeightTransferInitRequest(init_info=info)


def update_request(info: dict[str, Any]) -> Any:
    """Return what AsyncLLM's `update_weights` takes."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    return WeightTransferUpdateRequest(update_info=info)


async def pause(engine: Any, mode: str) -> float:
    """Pause an AsyncLLM like its `pause_generation`; with `wait`, until no request is left that has tokens.

    vLLM waits for what runs. A request that it has preempted, for want of KV blocks, stands in the queue with
    its tokens, and would go on with the new weights: so vLLM goes on and is paused again, until all have
    ended.

    Returns:
        Since when it stands (`time.perf_counter`): the last outputs may come later.
    """
    since = await _pause(engine, mode)
    while mode == "wait" and await begun(engine.output_processor.request_states):
        await engine.resume_generation()
        since = await _pause(engine, mode)
    return since


async def _pause(engine: Any, mode: str) -> float:
    if mode != "keep":  # the scheduler then clears its half of this cache
        await engine.renderer.clear_mm_cache_async()
    await engine.engine_core.pause_scheduler_async(mode=mode, clear_cache=mode != "keep")
    return time.perf_counter()


async def begun(states: Any) -> int:
    """Return how many of an AsyncLLM's requests have tokens, once those on their way have come."""
    for _ in range(20):  # ms, as vLLM's own pause_generation sleeps for its last outputs
        if not states:
            return 0
        await asyncio.sleep(1e-3)
    return sum(not state.is_prefilling for state in states.values())


def caches_prefixes(vllm_config: Any) -> bool:
    """Whether the engine holds keys and values for later requests, in its own cache or by a KV connector."""
    own = vllm_config.cache_config.enable_prefix_caching
    return bool(own or vllm_config.kv_transfer_config is not None)


def number_of_label(label: str) -> int:
    """Return the number that vLLM's label of its weights is; 0 for another one, as the first (`default`)."""
    return int(label) if label.isdecimal() else 0


def has_our_backend(vllm_config: Any) -> bool:
    """Whether the engine was made to be refitted by fp8sync."""
    transfer = vllm_config.weight_transfer_config
    return transfer is not None and transfer.backend == "fp8sync"


def engine_commit(vllm_config: Any) -> str:
    """Return how the engine was made to be refitted, as vLLM's `additional_config` says.

    `{"fp8sync": {"commit": "in-place"}}` keeps staging memory small.
    """
    given = vllm_config.additional_config
    options = given.get("fp8sync", {}) if isinstance(given, dict) else {}
    return str(options.get("commit", "staged"))


def worker_rank(parallel_config: Any) -> int:
    """Return this worker's rank among all workers of the engine, data-parallel replicas included."""
    index = getattr(parallel_config, "data_parallel_index", parallel_config.data_parallel_rank)
    return int(index * parallel_config.world_size + parallel_config.rank)


def unreached(parallel_config: Any) -> str:
    """Return why an engine's caller, or a server's, does not reach all of its workers; or ""."""
    if getattr(parallel_config, "local_engines_only", False):
        return (
            "data parallel with an external or hybrid load balancer: expected an engine that reaches all "
            "replicas, found one that reaches those of its own rank or node alone; let vLLM balance "
            "them itself"
        )
    return ""


def weights_asleep() -> bool:
    """Whether this worker's weights are away, at either level of vLLM's own sleep."""
    return "weights" in asleep()


def asleep() -> set[str]:
    """What of this worker is away, by vLLM's tags: `weights`, `kv_cache`."""
    from vllm.device_allocator.cumem import CuMemAllocator

    pool = CuMemAllocator.instance
    # Copied, as another thread may allocate.
    kept = [] if pool is None else list(pool.pointer_to_data.values())
    # Before 0.25 a record says so by `early.py`, once it has slept.
    return {each.tag for each in kept if getattr(each, "is_asleep", False)}


def is_attention(module: torch.nn.Module) -> bool:
    """Whether the module owns KV-cache scales."""
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    return isinstance(module, (Attention, MLAAttention))


def is_mla(module: torch.nn.Module) -> bool:
    """Whether the module derives weights of its own from kv_b_proj."""
    from vllm.model_executor.layers.attention import MLAAttention

    return isinstance(module, MLAAttention)


def derived_from(module: Any) -> list[torch.nn.Module]:
    """Return the modules from whose weights vLLM derives weights of this one."""
    return [module.kv_b_proj] if is_mla(module) else []


def has_scaled_kv_cache(module: Any) -> bool:
    """Whether an attention module stores keys and values divided by scales that can be loaded."""
    from vllm.v1.kv_cache_interface import (
        is_quantized_kv_cache,
        kv_cache_uses_per_token_head_scales,
    )

    dtype = module.kv_cache_dtype
    # Versions after 0.27 have no scales that are computed on the way.
    computed = getattr(module, "calculate_kv_scales", False)
    dynamic = kv_cache_uses_per_token_head_scales(dtype) or computed
    return bool(is_quantized_kv_cache(dtype) and not dynamic)


def kv_cache_method(module: Any) -> Any:
    """Return what makes a module's KV-cache scale parameters and turns them into buffers."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    own = getattr(module, "quant_method", None)
    # Unquantized models have none; the base class reads nothing of its config.
    return own if isinstance(own, BaseKVCacheMethod) else BaseKVCacheMethod(None)


def reads_host_scales(module: Any) -> bool:
    """Whether an attention module's kernels are launched with the host's KV-cache scales."""
    return "flashinfer" in type(module.impl).__module__


def captures_full_graphs() -> bool:
    """Whether attention is part of captured CUDA graphs; needs vLLM's current config."""
    from vllm.config import get_current_vllm_config

    mode = get_current_vllm_config().compilation_config.cudagraph_mode
    return bool(mode is not None and mode.has_full_cudagraphs())


def text_config() -> Any:
    """Return the Hugging Face config of the engine's text model; needs vLLM's current config."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config().model_config.hf_text_config


def kv_transfer_config() -> Any:
    """Return how the engine's KV connector was asked for, or None; needs vLLM's current config."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config().kv_transfer_config


def compiles_hooks() -> bool:
    """Whether torch compiles the model with all that is hooked to it; needs vLLM's current config."""
    from vllm.config import CompilationMode, get_current_vllm_config

    mode = get_current_vllm_config().compilation_config.mode
    return mode is CompilationMode.STOCK_TORCH_COMPILE


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    import torch

    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def holds_quantizable_weights(module: torch.nn.Module) -> bool:
    """Whether vLLM's FP8 method would quantize this module's 2-D weights."""
    from vllm.model_executor.layers.linear import LinearBase

    return isinstance(module, LinearBase) or "Experts" in type(module).__name__


def kept_formula(module: torch.nn.Module) -> Formula:
    """Return the scale formula that the module's kernel keeps as it was sent.

    DeepGEMM with E8M0 rounds every scale up to a power of two when it processes a weight; fp32 scales
    would be rounded a second time there.
    """
    method = getattr(module, "quant_method", None)
    kernel = getattr(method, "fp8_linear", None)
    backend = getattr(method, "fp8_backend", None)
    names = f"{type(kernel).__name__} {getattr(backend, 'name', '')}".upper().replace("_", "")
    if "DEEPGEMM" not in names:
        return Formula.FP32
    from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

    return Formula.POW2 if is_deep_gemm_e8m0_used() else Formula.FP32


def kernels_live_in_parameters(device: torch.device) -> bool:
    """Whether kernels read the registered parameters, as CUDA kernels do.

    On the processor they keep packed copies in closures on the module, so new weights need the new
    closures; on CUDA the first kernel objects stay, because captured graphs point into them.
    """
    return device.type == "cuda"


def keeps_first_experts(module: torch.nn.Module) -> str:
    """Return which vLLM it is that packs a layer's unquantized experts once only; empty where it does not.

    From 0.28 on, vLLM for the processor makes the kernel of such a layer when it first processes the
    weights, and passes over packing when there is one (`UnquantizedFusedMoEMethod._setup_kernel`). 0.32.0
    was 2.5 off in log-probabilities after a refit.
    """
    import vllm
    from vllm.platforms import current_platform

    method = getattr(module, "quant_method", None)
    if type(method).__name__ != "UnquantizedFusedMoEMethod" or not current_platform.is_cpu():
        return ""
    major, minor = (int(part) for part in vllm.__version__.split(".")[:2])
    return f"vLLM {vllm.__version__} on the processor" if (major, minor) >= (0, 28) else ""
