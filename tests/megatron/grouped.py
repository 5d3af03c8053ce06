"""All local experts of a layer in one parameter, as `moe_single_grouped_weight` keeps them.

Transformer Engine makes that parameter, and cannot be had on the processor. So the experts of a real model are
moved into modules and parameters as these sources make them:

- Megatron-Core 0.19.2, `extensions/transformer_engine.py`, `TEGroupedLinear.__init__`: classes
  `TEColumnParallelGroupedLinear` and `TERowParallelGroupedLinear` named `linear_fc1` and `linear_fc2`, their
  `num_gemms`, `single_grouped_weight`, `config`; `_set_expert_parameter_attributes`: `partition_dim` is that of
  one expert's matrix (1 by rows of experts, else 0), although the parameter has three dims.
- Transformer Engine 2.20.2, `pytorch/module/grouped_linear.py`, `make_grouped_weights`: one parameter `weight`
  of [experts, rows, columns], and `weight0`... registered as None; it holds BF16, so it has no `quantizer`.
  `pytorch/tensor/grouped_tensor.py`, `GroupedTensor`: a wrapper without memory of its own, contiguous strides,
  elements in the flat `rowwise_data`; only `detach`, `alias` and `view(-1)` are allowed (`BANNED_SHAPE_OPS`,
  `__torch_dispatch__`).
- Megatron-Core's `fp8_utils.py`, `modify_grouped_tensor_rowwise_storage`: DDP replaces `rowwise_data`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fp8sync.sources.megatron import MegatronSource
from tests.megatron.checks import differences, gather, load, mastered, reference, refitted, staged
from tests.megatron.transfer import assemble

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


class GroupedTensor(torch.Tensor):
    """Transformer Engine's, of experts in BF16: its shape, its memory and what it forbids."""

    rowwise_data: torch.Tensor
    quantizer = None

    @staticmethod
    def of(members: Sequence[torch.Tensor]) -> GroupedTensor:
        return GroupedTensor._around(
            torch.stack(list(members)).view(-1), (len(members), *members[0].shape)
        )

    @staticmethod
    def _around(data: torch.Tensor, shape: Any) -> GroupedTensor:
        made: Any = torch.Tensor._make_wrapper_subclass(
            GroupedTensor, tuple(shape), dtype=data.dtype
        )
        made.rowwise_data = data
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return cls._around(args[0].rowwise_data, args[0].shape)
        if func is aten.view.default and tuple(args[1]) in ((-1,), (args[0].numel(),)):
            return args[0].rowwise_data
        raise RuntimeError(f"GroupedTensor forbids {func}")


def check_grouped(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Everything that is asked of a layout, and of engines, with experts in one parameter."""
    bridge, chunks = _stacked(checkpoint, axes, GroupedTensor.of)
    faults = refitted(checkpoint, bridge, chunks) + staged(checkpoint, bridge, chunks)
    source = MegatronSource(chunks, bridge)
    merged = gather(source.manifest())
    for chunk in chunks:  # as DDP does, and an optimizer's step
        for parameter in chunk.parameters():
            if hasattr(parameter, "rowwise_data"):
                parameter.rowwise_data = parameter.rowwise_data * 2
            else:
                parameter.data.mul_(2)
    doubled = {name: tensor * 2 for name, tensor in reference(checkpoint).items()}
    return faults + differences(assemble(merged, source.storages()), doubled)


def check_grouped_masters(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """The masters of such parameters; here in plain memory, which the real DDP can divide."""
    return mastered(checkpoint, axes, partial(_stacked, checkpoint, axes, torch.stack))


def _stacked(
    checkpoint: Path, axes: dict[str, int], stack: Callable[[Any], Any]
) -> tuple[Any, list]:
    bridge, chunks = load(checkpoint, axes)
    for chunk in chunks:
        for name, module in list(chunk.named_modules()):
            if name.endswith(".mlp.experts"):
                _stack(module, stack)
    return bridge, chunks


def _stack(experts: Any, stack: Callable[[Any], Any]) -> None:
    """Move the weights of Megatron-Core's local experts into one parameter for each linear layer."""
    local = list(experts.local_experts)
    del experts.local_experts
    for linear, kind, dim in (("linear_fc1", "Column", 0), ("linear_fc2", "Row", 1)):
        weights = [getattr(expert, linear).weight for expert in local]
        module: Any = type(f"TE{kind}ParallelGroupedLinear", (nn.Module,), {})()
        module.config, module.num_gemms = experts.config, len(local)
        module.single_grouped_weight, module.single_grouped_bias = True, False
        module.weight = nn.Parameter(stack([weight.detach() for weight in weights]))
        for number in range(len(local)):
            module.register_parameter(f"weight{number}", None)
        module.weight.allreduce = weights[0].allreduce
        module.weight.tensor_model_parallel, module.weight.partition_dim = True, dim
        setattr(experts, linear, module)
