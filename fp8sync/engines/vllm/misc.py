"""The misc path's last step: whole tensors, in the plan's order, through the engine's own loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fp8sync.engines.vllm.storage import MISC, module_of
from fp8sync_kernels import quantize_blockwise

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from fp8sync.recipe import Formula

__all__ = ["load_misc", "unloaded"]


def load_misc(
    model: Any, staged: Mapping[str, torch.Tensor], quantize: Mapping[str, Formula]
) -> None:
    """Give `model.load_weights` every whole tensor; the modules that own them are in load form.

    Args:
        model: the vLLM model.
        staged: filled tensors by storage name; those under `misc/` are meant.
        quantize: tensors that were sent unquantized for FP8 parameters, with their formula.
    """
    whole = {n.removeprefix(MISC): t for n, t in staged.items() if n.startswith(MISC)}
    if whole:
        model.load_weights(_fed(whole, quantize))


def _fed(
    whole: Mapping[str, torch.Tensor], quantize: Mapping[str, Formula]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in whole.items():
        if name in quantize:
            pair = quantize_blockwise(tensor, quantize[name].value)
            yield name, pair.weight
            yield name + "_scale_inv", pair.scale_inv
        else:
            yield name, tensor


def unloaded(model: torch.nn.Module, storages: Collection[str]) -> list[str]:
    """Return which of these parameters, staged full of NaN, the loader has not filled.

    Integers cannot say it of themselves and are believed.
    """
    faults = []
    for storage in sorted(storages):
        owner = model.get_submodule(module_of(storage))
        tensor: torch.Tensor = getattr(owner, storage.rpartition(".")[2])
        left = _nans(tensor)
        if left:
            faults.append(f"{storage}: {left} of {tensor.numel()} elements were filled by nothing")
    return faults


def _nans(tensor: torch.Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    if tensor.itemsize == 1:  # E4M3: all bits but the sign
        return int(((tensor.detach().view(torch.uint8) & 0x7F) == 0x7F).sum())
    return int(torch.isnan(tensor).sum())
