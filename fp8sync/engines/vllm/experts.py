"""Expert layers that cannot be refitted as they are: refused before anything is planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8sync.engines.vllm.compat import keeps_first_experts
from fp8sync.errors import UnsupportedLayout

if TYPE_CHECKING:
    import torch

__all__ = ["check_experts"]


def check_experts(model: torch.nn.Module, rank: int) -> None:
    """Check that experts stay where boxes put them, and that new weights reach their kernels.

    Args:
        model: this worker's.
        rank: of the worker, for the error.

    Raises:
        UnsupportedLayout: naming each layer that load balancing moves, or that goes on with the first
            weights.
    """
    moving, stale = [], []
    for name, module in model.named_modules():
        where = f"{name} (engine rank {rank})"
        parallel = getattr(getattr(module, "moe_config", None), "moe_parallel_config", None)
        if getattr(parallel, "enable_eplb", False):
            moving.append(f"{where}: expected experts that stay, found enable_eplb")
        if found := keeps_first_experts(module):
            stale.append(f"{where}: expected a kernel that takes new weights, found {found}")
    if moving:
        raise UnsupportedLayout("expert parallel load balancing is on", moving + stale)
    if stale:
        raise UnsupportedLayout("unquantized experts would go on with their first weights", stale)
