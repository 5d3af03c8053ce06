"""Trainers to verify with, each from the same Hugging Face checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.verify.engines import NotRun

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Subject", "build_megatron", "load_trainer"]

_AXES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "cp": "context_parallel_size",
}


@dataclass(frozen=True)
class Subject:
    """A trainer, and the policy that it stands for.

    Args:
        source: what a link reads: a module or a `Source`.
        tensors: every tensor that it reads, as this rank holds it.
        policy: gives logits for `input_ids`; every rank calls it. Of the same weights.
        config: the transformers configuration.
        note: what a reader of the figures has to know.
    """

    source: Any
    tensors: Sequence[torch.Tensor]
    policy: torch.nn.Module
    config: Any
    note: str = ""


def load_trainer(path: Path, layout: str, *, fp8_parameters: bool = False) -> Subject:
    """Load a checkpoint into a trainer.

    Args:
        path: folder of a BF16 Hugging Face checkpoint.
        layout: `replicated`, `fsdp2`, or axes of Megatron such as `tp=2,pp=2,ep=4`.
        fp8_parameters: keep Megatron's linear weights as Transformer Engine blockwise FP8.

    Raises:
        UnsupportedLayout: a layout of another form.
        NotRun: Megatron is not installed here.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    policy = _hugging_face(path)
    if layout in {"replicated", "fsdp2"}:
        if layout == "fsdp2":
            _shard(policy)
        return Subject(policy, _tensors(policy), policy, policy.config)
    try:
        source, chunks, note = build_megatron(path, _axes(layout), fp8_parameters=fp8_parameters)
    except ImportError as error:
        raise NotRun(f"no Megatron trainer here: {error}") from error
    tensors = [tensor for chunk in chunks for tensor in _tensors(chunk)]
    return Subject(source, tensors, policy, policy.config, note)


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, and buffers that checkpoints hold (a router's bias); not what quantizers keep there."""
    state = module.state_dict(keep_vars=True).values()
    return [
        value for value in state if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]


def _hugging_face(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return model.cuda() if torch.cuda.is_available() else model


def _shard(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def _axes(layout: str) -> dict[str, int]:
    pairs = [axis.partition("=") for axis in layout.split(",")]
    unknown = [f"{name}{sign}{size}" for name, sign, size in pairs if name not in _AXES or not size]
    if unknown:
        known = f"replicated, fsdp2, or sizes of {', '.join(_AXES)} such as tp=2,pp=2"
        raise UnsupportedLayout(f"a trainer's layout {layout!r}: known are {known}", unknown)
    return {name: int(size) for name, _, size in pairs}


def build_megatron(
    path: Path, axes: dict[str, int], *, fp8_parameters: bool
) -> tuple[Any, list[Any], str]:
    """Load a checkpoint into this rank's Megatron model.

    Args:
        path: folder of a BF16 Hugging Face checkpoint.
        axes: sizes by name: tp, pp, ep, etp, cp.
        fp8_parameters: keep linear weights as Transformer Engine blockwise FP8.

    Returns:
        The source, the model chunks, and a note on the trainer.
    """
    from megatron.bridge import AutoBridge

    from fp8sync.sources.megatron import MegatronSource

    bridge = AutoBridge.from_hf_pretrained(str(path))
    provider = bridge.to_megatron_provider()
    for name, size in axes.items():
        setattr(provider, _AXES[name], size)
    provider.pipeline_dtype = torch.bfloat16
    if fp8_parameters:
        provider.fp8, provider.fp8_recipe, provider.fp8_param = "e4m3", "blockwise", True
    provider.finalize()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, bf16=True)
    return MegatronSource(chunks, bridge), chunks, ""
