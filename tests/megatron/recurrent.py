"""Mamba and gated delta networks on the processor: their weights, without the kernels they run with.

Megatron-Core refuses to make such a layer where the packages of its kernels are missing (mamba-ssm,
which cannot be imported without its CUDA extension, and flash-linear-attention). They are stood in
for; their functions would be called in a forward pass only. The one weight that mamba-ssm itself makes,
that of its gated norm, is made here.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tests.megatron.stand_ins import stand_in

_KERNELS = (
    "fla fla.modules fla.modules.convolution fla.modules.l2norm fla.ops fla.ops.gated_delta_rule "
    "mamba_ssm mamba_ssm.ops mamba_ssm.ops.triton mamba_ssm.ops.triton.ssd_combined"
)


class _GatedNorm(torch.nn.Module):
    """mamba-ssm's RMSNorm: arguments and weight."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))


def stand_in_kernels() -> None:
    """Before Megatron-Core is imported."""
    for name in _KERNELS.split():
        sys.modules[name] = stand_in(name)
    norms = stand_in("mamba_ssm.ops.triton.layernorm_gated")
    norms.RMSNorm = _GatedNorm
    sys.modules[norms.__name__] = norms


def settings(provider: Any) -> dict[str, Any]:
    """What a provider of such a model is to be set to, without Transformer Engine."""
    if getattr(provider, "experimental_attention_variant", None) == "gated_delta_net":
        # Zero-centred norms are Transformer Engine's; the bridge maps their weights all the same.
        return {"transformer_layer_spec": _gated_delta, "layernorm_zero_centered_gamma": False}
    if getattr(provider, "is_hybrid_model", False):
        from megatron.core.models.hybrid import hybrid_block
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        hybrid_block.TENorm = WrappedTorchNorm  # the last norm, which no spec names
        return {"hybrid_stack_spec": _hybrid()}
    return {}


def _gated_delta(config: Any, vp_stage: int | None = None) -> Any:
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_linear_attention_pattern,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    plain = copy.copy(config)
    plain.experimental_attention_variant = plain.linear_attention_freq = None
    block = get_gpt_decoder_block_spec(plain, use_transformer_engine=False, vp_stage=vp_stage)
    parts = GatedDeltaNetSubmodules(ColumnParallelLinear, WrappedTorchNorm, RowParallelLinear)
    delta = ModuleSpec(module=GatedDeltaNet, submodules=parts)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    linear = get_linear_attention_pattern(config)[first:]
    block.layer_specs = [
        replace(layer, submodules=replace(layer.submodules, self_attention=delta))
        if here
        else layer
        for layer, here in zip(block.layer_specs, linear, strict=False)
    ]
    return block


def _hybrid() -> Any:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    layers = hybrid_stack_spec.submodules
    mixer = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    mamba = replace(
        layers.mamba_layer.submodules,
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(module=MambaMixer, submodules=mixer),
    )
    attention = layers.attention_layer.submodules
    heads = replace(
        attention.self_attention.submodules,
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
    )
    attention = replace(
        attention,
        input_layernorm=WrappedTorchNorm,
        self_attention=replace(attention.self_attention, submodules=heads),
    )
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = layers.mlp_layer.submodules
    mlp = replace(
        mlp, pre_mlp_layernorm=WrappedTorchNorm, mlp=partial(mlp.mlp.func, submodules=parts)
    )
    made = HybridStackSubmodules(
        mamba_layer=replace(layers.mamba_layer, submodules=mamba),
        attention_layer=replace(layers.attention_layer, submodules=attention),
        mlp_layer=replace(layers.mlp_layer, submodules=mlp),
    )
    return ModuleSpec(module=HybridStack, submodules=made)
