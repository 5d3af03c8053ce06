"""The trainer's own ranks: who we are, and how rank 0 tells the others where the link listens."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["announce", "rank_and_size"]

_ROOM = 512


def rank_and_size() -> tuple[int, int]:
    """Return (rank, ranks) of torch.distributed's default group, (0, 1) without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def announce(info: dict[str, Any] | None) -> dict[str, Any]:
    """Give rank 0's `info` to every rank of the default group, as JSON in one uint8 broadcast."""
    rank, size = rank_and_size()
    if size == 1:
        return info or {}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    room = torch.zeros(_ROOM, dtype=torch.uint8)
    if rank == 0:
        data = json.dumps(info).encode()
        room[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    room = room.to(device)
    dist.broadcast(room, src=0)
    return json.loads(bytes(room.tolist()).rstrip(b"\0"))
