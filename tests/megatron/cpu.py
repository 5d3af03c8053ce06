"""Megatron-Bridge without a GPU and without Transformer Engine.

Megatron-Core itself runs on the CPU. Megatron-Bridge imports Transformer Engine for its LoRA layers,
and some constructors touch CUDA although they only make weights; both are met here, and nothing of
what they replace takes part in a conversion. Docs: docs/megatron.md, "Without a GPU".
"""

from __future__ import annotations

import copy
import importlib
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from tests.megatron import recurrent
from tests.megatron.stand_ins import stand_in

if TYPE_CHECKING:
    from collections.abc import Iterator

TE_VERSION = "2.20.2"
STAND_INS = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ops")


def import_bridge() -> None:
    """Import `megatron.bridge`, with a stand-in for Transformer Engine where it is missing."""
    recurrent.stand_in_kernels()
    # First: Megatron-Core decides here that there is no Transformer Engine, and keeps to it.
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:
        for name in STAND_INS:
            sys.modules[name] = stand_in(name, TE_VERSION)
    importlib.import_module("megatron.bridge")
    _without_cuda()


def _without_cuda() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
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
    from megatron.core import parallel_state

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
    )
    provider = bridge.to_megatron_provider(load_weights=load)
    settings = {
        "tensor_model_parallel_size": axes.get("tp", 1),
        "pipeline_model_parallel_size": axes.get("pp", 1),
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": axes.get("cp", 1),
        "expert_model_parallel_size": axes.get("ep", 1),
        "expert_tensor_parallel_size": expert_tp,
    }
    if "pad" in axes:
        settings |= {"should_pad_vocab": True, "make_vocab_size_divisible_by": axes["pad"]}
    for name, value in {**settings, **settings_of(provider), **changes}.items():
        setattr(provider, name, value)
    provider.finalize()
    return provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=True, bf16=True
    )


def settings_of(provider: Any) -> dict[str, Any]:
    """What a provider is to be set to, whatever its layout: no fused kernels, local layers."""
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec: Any = local_layer_spec
    if getattr(provider, "multi_latent_attention", False):
        spec = partial(get_gpt_decoder_block_spec, use_transformer_engine=False)
    settings = {
        "sequence_parallel": False,
        "pipeline_dtype": torch.bfloat16,
        "moe_token_dispatcher_type": "allgather",
        "transformer_layer_spec": spec,
        "batch_p2p_sync": False,
    }
    off = (
        "gradient_accumulation_fusion apply_rope_fusion bias_dropout_fusion masked_softmax_fusion "
        "bias_activation_fusion persist_layer_norm cross_entropy_loss_fusion moe_permute_fusion "
        "moe_shared_expert_overlap"
    )
    return settings | dict.fromkeys(off.split(), False) | recurrent.settings(provider)


def with_optimizer(chunks: list, *, distributed: bool, overlap: bool = False) -> tuple[list, Any]:
    """Wrap chunks in Megatron's DDP, and give them Adam with FP32 masters.

    Args:
        chunks: this rank's model chunks.
        distributed: whether the optimizer divides its masters among the data-parallel ranks.
        overlap: whether it leaves the all-gather of parameters to the next forward.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    parts = {"use_distributed_optimizer": distributed}
    ddp = DistributedDataParallelConfig(**parts, overlap_param_gather=overlap, bucket_size=50_000)
    config = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, **parts)
    with said_to_be_cuda():
        wrapped = [
            DistributedDataParallel(config=chunk.config, ddp_config=ddp, module=chunk)
            for chunk in chunks
        ]
        return wrapped, get_megatron_optimizer(config, wrapped)


class Stream:
    """The one stream of a processor."""

    def wait_stream(self, _: Any) -> None:
        pass


@contextmanager
def one_stream() -> Iterator[None]:
    """Megatron's schedules ask CUDA for streams, which a processor does not have."""
    with (
        patch.object(torch.cuda, "Stream", Stream),
        patch.object(torch.cuda, "current_stream", Stream),
        patch.object(torch.cuda, "stream", lambda _: nullcontext()),
    ):
        yield


@contextmanager
def said_to_be_cuda() -> Iterator[None]:
    """Megatron's optimizers know tensors by the name of a CUDA type, and make scalars on CUDA."""
    read = torch.Tensor.type

    def told(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = read(tensor, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    def made_by(make: Any) -> Any:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            return make(*args, **kwargs, device="cpu" if device == "cuda" else device)

        return made

    with ExitStack() as patches:
        patches.enter_context(patch.object(torch.Tensor, "type", told))
        for name in ("tensor", "zeros", "ones", "empty", "full"):
            patches.enter_context(patch.object(torch, name, made_by(getattr(torch, name))))
        yield
