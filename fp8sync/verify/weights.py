"""Other weights for a while: junk, to see that nothing is skipped, and a step away, as an optimizer goes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["junk", "scaled"]


@contextmanager
def junk(parameters: Sequence[torch.Tensor], seed: int) -> Iterator[None]:
    """Other values in every parameter for the duration, different from rank to rank."""
    generator = torch.Generator().manual_seed(1000 * (seed + 1))

    def noise(local: torch.Tensor) -> torch.Tensor:
        values = torch.rand(local.shape, dtype=torch.float32, generator=generator) - 0.5
        return values + values.sign()  # no value near a weight's, none is zero

    with _changed(parameters, noise):
        yield


@contextmanager
def scaled(parameters: Sequence[torch.Tensor], factor: float) -> Iterator[None]:
    """Every matrix times `factor` for the duration, and nothing else.

    The same change in any layout: a trainer's shards and a policy that holds whole tensors stay equal.
    """
    matrices = [p for p in parameters if p.dim() > 1]
    with _changed(matrices, lambda local: local * factor):
        yield


@contextmanager
def _changed(
    parameters: Sequence[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    held = list({id(p): _local(p) for p in parameters}.values())
    kept = [local.detach().clone() for local in held]
    with torch.no_grad():
        for local in held:
            local.copy_(change(local))
    try:
        yield
    finally:
        with torch.no_grad():
            for local, before in zip(held, kept, strict=True):
                local.copy_(before)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    to_local: Any = getattr(parameter.data, "to_local", None)
    return to_local() if to_local is not None else parameter.data
