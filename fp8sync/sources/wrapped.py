"""What other libraries put around a module: taken off, or refused by name."""

from __future__ import annotations

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.sources.places import COMPILED

__all__ = ["check_readable", "unwrapped"]


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Return what is in torch's DDP and in `torch.compile`, in whichever order."""
    while True:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            module = module.module
        elif (inner := module._modules.get(COMPILED)) is not None:
            module = inner
        else:
            return module


def check_readable(module: torch.nn.Module) -> None:
    """Refuse modules whose parameters are no Hugging Face tensors, nor shards that say what they are of.

    Raises:
        UnsupportedLayout: says what is expected instead.
    """
    kind, faults = type(module).__name__, []
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        faults.append("FullyShardedDataParallel (FSDP1): expected fully_shard (FSDP2)")
    named = list(module.named_parameters())
    if any(
        getattr(parameter, "ds_numel", parameter.numel()) != parameter.numel()
        for _, parameter in named
    ):
        faults.append("DeepSpeed ZeRO-3: expected gathered parameters, or FSDP2's DTensors")
    if hasattr(module, "peft_config") and any(".base_layer." in name for name, _ in named):
        faults.append("adapters of PEFT: expected them merged (merge_and_unload)")
    if faults:
        raise UnsupportedLayout(f"cannot read weights from {kind}", faults)
    if any(hasattr(parameter, "tensor_model_parallel") for _, parameter in named):
        raise UnsupportedLayout(f"{kind} is a Megatron-Core model: expected its bridge=")
