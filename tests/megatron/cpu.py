"""Megatron-Bridge without a GPU and without Transformer Engine.

Megatron-Core itself runs on the CPU. Megatron-Bridge imports Transformer Engine for its LoRA layers,
and some constructors touch CUDA although they only make weights; both are met here, and nothing of
what they replace takes part in a conversion. Docs: docs/megatron.md, "Without a GPU".
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
from contextlib import nullcontext
from functools import partial
from importlib.machinery import ModuleSpec
from typing import Any

import torch

TE_VERSION = "2.20.2"
STAND_INS = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ops")


def import_bridge() -> None:
    """Import `megatron.bridge`, with a stand-in for Transformer Engine where it is missing."""
    # First: Megatron-Core decides here that there is no Transformer Engine, and keeps to it.
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:
        for name in STAND_INS:
            sys.modules[name] = _stand_in(name)
    importlib.import_module("megatron.bridge")
    _without_cuda()


def _stand_in(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__version__ = TE_VERSION

    def anything(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        child = f"{name}.{attribute}"
        return sys.modules.get(child) or type(attribute, (torch.nn.Module,), {"__module__": name})

    module.__getattr__ = anything
    return module


def _without_cuda() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    torch.cuda.current_device = lambda: "cpu"
    torch.Tensor.cuda = lambda self, *_, **__: self
    CudaRNGStatesTracker.fork = lambda self, *_, **__: nullcontext()
    build = DotProductAttention.__init__

    def build_any(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # The local attention has no weights, but knows neither the head widths of multi-latent
        # attention nor context parallelism.
        kwargs.pop("k_channels", None)
        kwargs.pop("v_channels", None)
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        build(self, alone, *args, **kwargs)

    DotProductAttention.__init__ = build_any


def build_chunks(bridge: Any, axes: dict[str, int], *, load: bool = True, **changes: Any) -> list:
    """Build this rank's model chunks on the CPU and load the bridge's checkpoint into them.

    Args:
        bridge: a `megatron.bridge.AutoBridge`.
        axes: sizes of the parallel axes: tp, pp, cp, ep, etp, and vpp; 1 where absent. Beside them,
            `pad` is what the vocabulary is padded to a multiple of, times tp.
        load: whether to load the checkpoint.
        changes: further attributes of the provider.
    """
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    parallel_state.destroy_model_parallel()
    virtual = axes.get("vpp", 1) if axes.get("vpp", 1) > 1 else None
    expert_tp = axes.get("etp", 1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=axes.get("tp", 1),
        pipeline_model_parallel_size=axes.get("pp", 1),
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=axes.get("cp", 1),
        expert_model_parallel_size=axes.get("ep", 1),
        expert_tensor_parallel_size=expert_tp,
        create_gloo_process_groups=False,
    )
    provider = bridge.to_megatron_provider(load_weights=load)
    settings = {
        "tensor_model_parallel_size": axes.get("tp", 1),
        "pipeline_model_parallel_size": axes.get("pp", 1),
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": axes.get("cp", 1),
        "expert_model_parallel_size": axes.get("ep", 1),
        "expert_tensor_parallel_size": expert_tp,
        "sequence_parallel": False,
        "pipeline_dtype": torch.bfloat16,
        "moe_token_dispatcher_type": "allgather",
        "transformer_layer_spec": local_layer_spec,
    }
    if "pad" in axes:
        settings |= {"should_pad_vocab": True, "make_vocab_size_divisible_by": axes["pad"]}
    if getattr(provider, "multi_latent_attention", False):
        spec = partial(get_gpt_decoder_block_spec, use_transformer_engine=False)
        settings["transformer_layer_spec"] = spec
    off = (
        "gradient_accumulation_fusion apply_rope_fusion bias_dropout_fusion masked_softmax_fusion "
        "bias_activation_fusion persist_layer_norm cross_entropy_loss_fusion moe_permute_fusion "
        "moe_shared_expert_overlap"
    )
    for name, value in {**settings, **dict.fromkeys(off.split(), False), **changes}.items():
        setattr(provider, name, value)
    provider.finalize()
    return provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=True, bf16=True
    )
