"""The trainer's own ranks: who we are, what rank 0 tells the others, and teams of ranks.

What rank 0 tells goes through the store of torch.distributed's default group: plain JSON of any length,
every wait bounded, and no collective that a rank which failed could leave others waiting in.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store

from fp8sync.errors import Fp8SyncError, TransferTimeout
from fp8sync.transport.gloo import GlooGroup
from fp8sync.transport.memory import gpu_id
from fp8sync.transport.nccl import NcclGroup, new_unique_id
from fp8sync.transport.rendezvous import is_loopback, own_host
from fp8sync.waiting import waiting

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Opening", "exchange", "hear", "join_team", "rank_and_size", "this_process"]

dist: Any = torch.distributed  # its stores are not in its stubs

_TURN = "fp8sync/turn"
_HEARD = "fp8sync/heard"
_MET = "fp8sync/met"
_LATE_S = 600.0
"""How long ranks may come after one another, who may be loading what they hold."""
_KEPT = 4
"""Announcements that stay in the store."""


def rank_and_size() -> tuple[int, int]:
    """Return (rank, ranks) of torch.distributed's default group, (0, 1) without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def exchange(told: Any) -> list[Any]:
    """Return what every rank tells, in rank order; a collective of the default group, once all have come.

    Args:
        told: JSON-able data, which travels as such: two all-gathers of bytes.

    Raises:
        TransferTimeout: naming ranks that did not come. What fails in the all-gathers is torch's to report.
    """
    rank, size = rank_and_size()
    if size == 1:
        return [told]
    _meet(rank, size, _LATE_S)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    data = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
    length = torch.tensor([data.numel()], device=device)
    lengths = [torch.zeros_like(length) for _ in range(size)]
    dist.all_gather(lengths, length)
    sizes = [int(n) for n in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: data.numel()] = data
    rows = [torch.empty_like(padded, device=device) for _ in range(size)]
    dist.all_gather(rows, padded.to(device))
    return [json.loads(row[:n].cpu().numpy().tobytes()) for row, n in zip(rows, sizes, strict=True)]


def _meet(rank: int, size: int, timeout_s: float) -> None:
    """Wait until all ranks have come to this call."""
    store = _get_default_store()
    turn = store.add(f"{_MET}/of/{rank}", 1)
    store.set(f"{_MET}/{turn}/{rank}", "")
    # All have met at the one before, and left it, or this rank would not be here.
    if turn > 1:
        store.delete_key(f"{_MET}/{turn - 1}/{rank}")
    keys = [f"{_MET}/{turn}/{other}" for other in range(size)]
    try:
        with waiting():
            store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        late = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        # As if it had not come, so that all meet when they try again.
        store.delete_key(keys[rank])
        store.add(f"{_MET}/of/{rank}", -1)
        text = (
            f"trainer ranks {', '.join(late) or 'unknown'} did not come to exchange what all hold"
        )
        raise TransferTimeout(f"{text} within {timeout_s:g} s") from error


def this_process() -> str:
    """Return what to call this process where others hear of it."""
    return f"process {os.getpid()} of {socket.gethostname()}"


class Opening:
    """Trainer rank 0's word to the other ranks, once per call that all ranks make.

    An error that comes before anything was said is what the others are told; one that comes after an invitation
    takes its place, for ranks that would come when nobody listens any more.
    """

    def __init__(self) -> None:
        self._said = False
        self._invited_at = ""

    def __enter__(self) -> Opening:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        if not isinstance(error, Fp8SyncError):
            error = Fp8SyncError(f"trainer rank 0 failed: {error!r}")
        told = {"error": error.to_wire()}
        if not self._said:
            self.say(told)
        elif self._invited_at:
            _get_default_store().set(self._invited_at, json.dumps(told))

    def say(self, message: dict[str, Any]) -> None:
        """Tell all other ranks, which wait in `hear` or will."""
        self._said = True
        if rank_and_size()[1] == 1:
            return
        store = _get_default_store()
        turn = store.add(_TURN, 1)
        self._invited_at = f"{_TURN}/{turn}" if "open" in message else ""
        store.set(f"{_TURN}/{turn}", json.dumps(message))
        if turn > _KEPT:
            store.delete_key(f"{_TURN}/{turn - _KEPT}")


def hear(timeout_s: float) -> dict[str, Any]:
    """Wait for what trainer rank 0 says; what it has said before its latest word is passed over.

    Raises:
        TransferTimeout: nothing new within the timeout.
    """
    store, own = _get_default_store(), f"{_HEARD}/{rank_and_size()[0]}"
    heard = store.add(own, 0)
    turn = max(heard + 1, store.add(_TURN, 0))
    try:
        with waiting():
            store.wait([f"{_TURN}/{turn}"], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        text = f"trainer rank 0 made no call to connect or refit within {timeout_s:g} s"
        raise TransferTimeout(text) from error
    store.add(own, turn - heard)
    return json.loads(store.get(f"{_TURN}/{turn}"))


def join_team(
    rank: int, device: torch.device, name: str, host: str, timeout_s: float, ranks: tuple[int, ...]
) -> GlooGroup | NcclGroup:
    """Join a group of some of the trainer's ranks; they meet at the default group's store.

    NCCL, if each of them has a GPU of its own.

    Args:
        rank: this rank, one of `ranks`.
        device: where its weights are.
        name: of the group; together with the first of `ranks` used once.
        host: from where the ranks are reached.
        timeout_s: limit of every wait.
        ranks: of the trainer, in order.

    Raises:
        TransferTimeout: one of them did not come.
        EngineLost: NCCL refuses; says why.
    """
    store = dist.PrefixStore(f"fp8sync/{name}/{ranks[0]}", _get_default_store())
    number, loopback = ranks.index(rank), is_loopback(host)
    names = [f"trainer rank {other}" for other in ranks]
    store.set(f"gpu/{rank}", gpu_id(device))
    if rank == ranks[0]:
        made = new_unique_id(loopback=loopback) if device.type == "cuda" else ""
        store.set("nccl", made)
    keys = [f"gpu/{other}" for other in ranks]
    try:
        store.wait([*keys, "nccl"], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        text = f"one of {', '.join(names)} did not come within {timeout_s:g} s"
        raise TransferTimeout(text) from error
    gpus = {store.get(key) for key in keys}
    if len(gpus) == len(ranks) and b"" not in gpus:
        unique_id = store.get("nccl").decode()
        return NcclGroup(unique_id, number, names, device, timeout_s, loopback=loopback)
    return GlooGroup(store, number, len(ranks), own_host(host), timeout_s, dict(enumerate(names)))
