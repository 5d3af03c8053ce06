"""Where a member of a link sits: what can be mapped, what can be one NCCL rank, what shares a node."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fp8sync.transport.memory import gpu_id, host_id

if TYPE_CHECKING:
    import torch

__all__ = ["NODE_VARIABLE", "Seat", "node_id"]

NODE_VARIABLE = "FP8SYNC_NODE"
"""Environment variable that names the node of a process, for hosts that form one node, or one that is to be
taken for several (MIG, containers, tests). It decides who forwards to whom and nothing else."""


def node_id() -> str:
    """Return what processes share that are joined by the fast wires of one node."""
    return os.environ.get(NODE_VARIABLE) or host_id()


@dataclass(frozen=True)
class Seat:
    """Where a member's weights are.

    Args:
        host: `host_id`: equal where memory can be mapped.
        gpu: the GPU's identity, or an empty string.
        node: `node_id`: equal where bytes that several workers want are fed once and forwarded.
    """

    host: str
    gpu: str
    node: str

    @classmethod
    def at(cls, device: torch.device) -> Seat:
        """Return this process's seat, with its weights on `device`."""
        return cls(host_id(), gpu_id(device), node_id())

    def to_json(self) -> dict[str, str]:
        """Return `{"host", "gpu", "node"}`."""
        return asdict(self)
