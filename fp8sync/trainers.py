"""The trainer's own ranks: who we are, how rank 0 tells the others where the link listens, and teams."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from fp8sync.transport.gloo import GlooGroup
from fp8sync.transport.rendezvous import own_host

__all__ = ["announce", "join_team", "rank_and_size"]

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


def join_team(
    rank: int, name: str, host: str, timeout_s: float, ranks: tuple[int, ...]
) -> GlooGroup:
    """Join a group of some of the trainer's ranks; they meet at the default group's store.

    Args:
        rank: this rank, one of `ranks`.
        name: of the group; together with the first of `ranks` used once.
        host: from where the ranks are reached.
        timeout_s: limit of every wait.
        ranks: of the trainer, in order.

    Raises:
        TransferTimeout: one of them did not come.
    """
    store = dist.PrefixStore(f"fp8sync/{name}/{ranks[0]}", _get_default_store())
    names = {number: f"trainer rank {other}" for number, other in enumerate(ranks)}
    return GlooGroup(store, ranks.index(rank), len(ranks), own_host(host), timeout_s, names)
