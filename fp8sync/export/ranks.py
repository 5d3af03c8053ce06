"""What trainer ranks tell each other while they export, over torch.distributed's default group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fp8sync.errors import from_wire
from fp8sync.sending.share import named_error
from fp8sync.trainers import exchange, rank_and_size

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Attempts", "agree", "receive", "send"]


class Attempts:
    """Does one thing after the other until one fails; `fault` is what that one raised."""

    def __init__(self) -> None:
        self.fault: Exception | None = None

    def __call__(self, act: Callable[[], object]) -> None:
        """Do it, unless something failed before."""
        if self.fault is not None:
            return
        try:
            act()
        # Whatever it is: the ranks carry on in step, and all hear of it when they agree.
        except Exception as error:  # noqa: BLE001
            self.fault = error

    def settle(self) -> None:
        """Return if no rank has failed; otherwise raise on all ranks what the first one raised."""
        agree(self._result)

    def _result(self) -> None:
        if self.fault is not None:
            raise self.fault


def agree(act: Callable[[], Any]) -> list[Any]:
    """Return what `act` gave on every rank, in rank order: JSON-able data.

    Raises:
        Fp8SyncError: on all ranks, what it raised on the first that failed.
    """
    rank = rank_and_size()[0]
    try:
        told = {"error": None, "value": act()}
    except Exception as error:  # noqa: BLE001  (every rank raises it below)
        told = {"error": named_error(error, rank).to_wire(), "value": None}
    found = exchange(told)
    for said in found:
        if said["error"] is not None:
            raise from_wire(said["error"])
    return [said["value"] for said in found]


def send(payload: torch.Tensor, rank: int) -> None:
    """Send uint8 data to another rank."""
    dist.send(payload.to(_device()), rank)


def receive(nbytes: int, rank: int) -> torch.Tensor:
    """Receive as many bytes from another rank, into host memory."""
    payload = torch.empty(nbytes, dtype=torch.uint8, device=_device())
    dist.recv(payload, rank)
    return payload.cpu()


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
