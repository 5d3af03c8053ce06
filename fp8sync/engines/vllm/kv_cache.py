"""Scales of an FP8 KV cache: which modules take them, and everywhere that vLLM keeps them.

A scale lives in a device buffer (`_k_scale`), in a host float (`_k_scale_float`), and, folded with others,
in attention kernels' caches. vLLM creates parameters for loading them only in quantized models; here
every attention layer with an FP8 cache gets them for the time of a load. They are made under the
model's dtype, as at a first load: so a scale is rounded as a fresh engine would round it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8sync.engines.vllm import compat
from fp8sync.errors import RecipeMismatch, TensorMismatch, UnsupportedLayout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

__all__ = [
    "add_scale_parameters",
    "caching_modules",
    "check_scales",
    "forget_folded_scales",
    "process_scales",
    "restore_scales",
    "scale_floats",
    "watch_scales",
]

_FOLDED = ("bmm1_scale", "bmm2_scale")
_SCALES = ("k_scale", "v_scale", "q_scale", "prob_scale")


def add_scale_parameters(model: torch.nn.Module) -> None:
    """Give attention modules with an FP8 cache the parameters that vLLM's loader looks for.

    Made on torch's default device, with its default dtype. Undo with `ModuleState.restore`.
    """
    for _, module in _attention_modules(model):
        if "k_scale" not in module._parameters and compat.has_scaled_kv_cache(module):
            compat.kv_cache_method(module).create_weights(module)


def check_scales(
    model: torch.nn.Module, given: Mapping[str, set[str]], rank: int, *, full_graphs: bool
) -> None:
    """Check that every layer can take the scales sent, and that none is without.

    Args:
        model: the live model.
        given: by attention module, the parameters that are loaded (`k_scale`, ...).
        rank: this worker's, for messages.
        full_graphs: whether whole decode steps are captured in CUDA graphs.

    Raises:
        RecipeMismatch: the engine has no FP8 cache, or computes its scales by itself.
        TensorMismatch: a layer is sent one of k_scale and v_scale, or none while others are.
        UnsupportedLayout: the kernels bake the scales into captured graphs.
    """
    if not given:
        return
    modules = dict(_attention_modules(model))
    unfit = [
        f"{name} (engine rank {rank}): expected an FP8 cache with stored scales, "
        f"found kv_cache_dtype {modules[name].kv_cache_dtype!r}"
        for name in given
        if not compat.has_scaled_kv_cache(modules[name])
    ]
    if unfit:
        raise RecipeMismatch("KV-cache scales for an engine that keeps none", unfit)
    missing = [
        f"{name}.{scale} (engine rank {rank}): the trainer does not have it"
        for name, module in modules.items()
        if compat.has_scaled_kv_cache(module)
        for scale in _SCALES[:2]
        if scale not in given.get(name, ())
    ]
    if missing:
        raise TensorMismatch("KV-cache scales are incomplete", missing)
    baked = [n for n in given if full_graphs and compat.reads_host_scales(modules[n])]
    if baked:
        raise UnsupportedLayout(
            "this attention backend bakes KV-cache scales into full CUDA graphs; use "
            "FLASH_ATTN or TRITON_ATTN, or cudagraph_mode PIECEWISE",
            baked,
        )


def process_scales(module: torch.nn.Module) -> None:
    """Let vLLM turn loaded scale parameters into buffers and floats; the parameters go."""
    compat.kv_cache_method(module).process_weights_after_loading(module)


def forget_folded_scales(module: Any) -> None:
    """Make FlashInfer fold the scales anew at the next forward."""
    for name in _FOLDED:
        if hasattr(module.impl, name):
            setattr(module.impl, name, None)
    module._o_scale_float = None  # where it is set, vLLM takes it for folded


def restore_scales(modules: Iterable[torch.nn.Module]) -> None:
    """Put the host's scales back into the device buffers of those `caching_modules` with an FP8 cache.

    vLLM 0.25 to 0.27 fill the buffers with 1.0 when they wake the KV cache.
    """
    for module in modules:
        if compat.has_scaled_kv_cache(module):
            for name, value in scale_floats(module).items():
                buffer = module._buffers.get(name.removesuffix("_float"))
                if buffer is not None:
                    buffer.fill_(value)


def watch_scales(model: torch.nn.Module) -> None:
    """Restore scales before the next forward whenever vLLM has written to the buffers.

    Nothing is read from the device: torch counts the writes to a tensor. vLLM fills the buffers of all
    layers at once, so one is watched. A replay of a CUDA graph of the whole model calls no module; what
    follows a wake-up is a prefill, which is such a replay only with cudagraph_mode FULL.
    """
    modules = caching_modules(model)
    scaled = (m for m in modules if compat.has_scaled_kv_cache(m))
    buffer = next((m._buffers["_k_scale"] for m in scaled if "_k_scale" in m._buffers), None)
    if buffer is None or buffer.is_inference() or compat.compiles_hooks():
        return
    seen = buffer._version

    def restore(*_: Any) -> None:
        nonlocal seen
        if buffer._version != seen and not compat.is_capturing(buffer.device):
            restore_scales(modules)
            seen = buffer._version

    model.register_forward_pre_hook(restore)


def caching_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the attention modules that can have scales of their own (MLA's have none)."""
    return [module for _, module in _attention_modules(model)]


def scale_floats(module: torch.nn.Module) -> dict[str, float]:
    """Return the host's copies of a module's scales, by attribute name."""
    names = (f"_{scale}_float" for scale in _SCALES)
    return {name: float(vars(module)[name]) for name in names if name in vars(module)}


def _attention_modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if compat.is_attention(module) and not compat.is_mla(module):
            yield name, module
