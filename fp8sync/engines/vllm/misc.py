"""The misc path's last step: whole tensors, in the plan's order, through the engine's own loader."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.engines.vllm.storage import MISC, module_of
from fp8sync.errors import NonFiniteWeight
from fp8sync.wire.payload import infinite_in
from fp8sync_kernels import quantize_blockwise

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from fp8sync.engines.vllm.storage import EngineLayout
    from fp8sync.recipe import Formula

__all__ = ["check_finite", "load_misc", "unloaded"]


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


def check_finite(
    model: torch.nn.Module, layout: EngineLayout, staged: Mapping[str, torch.Tensor]
) -> None:
    """Refuse what the loader made infinite, or NaN, of the trainer's values, as by a cast to float16.

    Only where it puts them: it may fill anything else as it likes. Padding that it fills with Inf was seen
    when it was traced, and is a constant of the storage.

    Args:
        model: whose modules the loader has filled, in load form.
        layout: of what was loaded.
        staged: what it was given.

    Raises:
        NonFiniteWeight: naming the tensors that are too large for the storage's dtype; if each of them
            would fit, all that went there.
    """
    filled = {
        storage: tensor
        for storage in layout.by_loader
        if (tensor := _filled(model, storage)) is not None
    }
    found = {storage: _nonfinite(tensor, storage, layout) for storage, tensor in filled.items()}
    if not int(sum(found.values())):  # one answer of the GPU for all
        return
    counts: dict[torch.dtype, Counter[str]] = defaultdict(Counter)
    for storage, bad in found.items():
        if number := int(bad):
            dtype, names = filled[storage].dtype, layout.by_loader[storage]
            counts[dtype][", ".join(_too_large(names, staged, dtype) or names)] += number
    faults = [
        fault
        for dtype, of in counts.items()
        for fault in infinite_in(dtype, of, layout.rank).violations
    ]
    raise NonFiniteWeight("the trainer's weights are not finite in the engine", faults)


def _filled(model: torch.nn.Module, storage: str) -> torch.Tensor | None:
    """A storage that may hold Inf, which codes cannot."""
    found = getattr(model.get_submodule(module_of(storage)), storage.rpartition(".")[2], None)
    if not isinstance(found, torch.Tensor) or found.is_meta or found.itemsize == 1:
        return None
    return found if found.is_floating_point() else None


def _nonfinite(tensor: torch.Tensor, storage: str, layout: EngineLayout) -> torch.Tensor:
    values, first = tensor.detach(), layout.aliases.get(storage, storage)
    # NaN in an open one was filled by nothing, which `unloaded` tells.
    bad = values.isinf() if first in layout.open else ~values.isfinite()
    spec = layout.storages.get(first)
    if spec is not None and spec.constants:
        bad &= values != spec.fill(torch.zeros_like(values))
    return bad.sum()


def _too_large(
    names: Sequence[str], staged: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> list[str]:
    return [name for name in names if bool(staged[MISC + name].to(dtype).isinf().any())]


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
