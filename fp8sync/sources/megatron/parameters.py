"""What a conversion speaks of: a parameter of this rank, or what the bridge has to export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fp8sync.sources.megatron.held import expert_of

__all__ = ["LocalParameter", "LooseTask"]


@dataclass(frozen=True)
class LocalParameter:
    """One parameter (or persistent buffer) of this rank, and the mapping that speaks of it.

    Args:
        name: Megatron's name, with layer and expert numbers of the whole model.
        mapping: the bridge's mapping, resolved.
        module: the module that owns it.
        attribute: its name in that module.
        vocabulary: rows of the HF tensor where the parameter is a vocabulary; the rest is padding.
        expert: which of the module's experts, where one parameter holds them all.
    """

    name: str
    mapping: Any
    module: Any
    attribute: str
    vocabulary: int | None = None
    expert: int | None = None

    @property
    def kept(self) -> torch.nn.Parameter:
        """The module's parameter, which may hold other experts, too."""
        return getattr(self.module, self.attribute)

    def live(self) -> torch.Tensor:
        """Return the tensor as the module holds it now; optimizers may replace it.

        Raises:
            ValueError: a kind of tensor that is not known, or experts in one parameter whose elements
                cannot be read.
        """
        if self.expert is not None:
            return expert_of(self.kept, self.expert)
        kind = type(self.kept)
        # Detached, any subclass of Parameter looks plain, and may hold less than its mapping says: a
        # shard of generalized tensor parallelism does.
        if kind not in (torch.Tensor, torch.nn.Parameter) and not hasattr(kind, "get_metadata"):
            raise ValueError(f"expected a plain or FP8 tensor, found {kind.__name__}")
        return self.kept


@dataclass(frozen=True)
class LooseTask:
    """A conversion task whose tensors are no boxes; every rank has it.

    Args:
        task: the bridge's.
        parameter: what it converts, where this rank has it.
        reason: why its tensors are no boxes.
    """

    task: Any
    parameter: LocalParameter | None
    reason: str

    def live(self) -> torch.Tensor | None:
        """Return the parameter as the module holds it now."""
        return None if self.parameter is None else self.parameter.live()
