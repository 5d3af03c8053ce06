"""Models while they calibrate: what training alone does would count as well."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

__all__ = ["evaluating"]


@contextmanager
def evaluating(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Evaluate: no dropout, and no gradient checkpointing, which keeps no cache.

    Afterwards every module is in the mode it was in, also one that is not in its parent's.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.train(False)
        yield
    finally:
        for module, training in modes:  # parents come first
            module.train(training)
