"""Watches what listing boxes does: which tensors enter collectives, and which memory is allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable


class Watch(TorchDispatchMode):
    """Records weights in collectives and new floating-point storages.

    Attributes:
        collectives: how many collectives ran, of whatever.
        names: of the operations of torch.distributed that ran.
        faults: one line for each weight in a collective and for each allocation of floats.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._weights = {_storage(w) for w in weights}
        self.collectives = 0
        self.names: list[str] = []
        self.faults: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if func.namespace == "c10d":
            self.collectives += 1
            self.names.append(str(func).removesuffix(".default"))
            sent = [t for t in tensors if t.is_floating_point() or _storage(t) in self._weights]
            self.faults += [f"{func} of {t.dtype} {list(t.shape)}" for t in sent]
            return result
        known = {_storage(t) for t in tensors} | self._weights
        new = [t for t in made if t.is_floating_point() and _storage(t) not in known]
        self.faults += [f"{func} allocated {t.dtype} {list(t.shape)}" for t in new]
        return result


def _storage(tensor: torch.Tensor) -> int:
    return getattr(tensor, "rowwise_data", tensor).untyped_storage().data_ptr()
