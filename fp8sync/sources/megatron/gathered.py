"""HF tensors that are no boxes: Megatron-Bridge's own export, of their parameters alone.

The export is collective, and gives every rank each tensor in turn. Each stays with one rank, the one
that has been given the fewest bytes so far, until it is read; the others let go of it at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fp8sync.errors import Fp8SyncError, UnsupportedLayout, from_wire
from fp8sync.manifest import ITEMSIZE, Box, Placement, TensorInfo
from fp8sync.trainers import exchange, rank_and_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from fp8sync.sources.megatron.parameters import LooseTask

__all__ = ["GATHERED", "Gathered", "Owned", "divide"]

GATHERED = "gathered/"
"""Prefix of the storages that hold such tensors, whole."""


@dataclass(frozen=True)
class Owned:
    """A tensor that is gathered, and the rank that keeps it."""

    info: TensorInfo
    rank: int


class Gathered:
    """This rank's share of the tensors that the bridge exports.

    Args:
        bridge: a `megatron.bridge.AutoBridge`.
        chunks: unwrapped model chunks of this rank.
        tasks: what is to be exported, the same on every rank.
    """

    def __init__(self, bridge: Any, chunks: Sequence[Any], tasks: Sequence[LooseTask]) -> None:
        self._bridge, self._chunks, self._tasks = bridge, list(chunks), list(tasks)
        self._rank = rank_and_size()[0]
        self._owned: dict[str, Owned] | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def gather(self) -> None:
        """Export them; every rank calls it. The first time the ranks agree on who keeps what.

        Raises:
            UnsupportedLayout: ranks are given different tensors under one name, or one cannot travel.
            Fp8SyncError: on every rank, if the export fails on one of them.
        """
        if not self._tasks:
            return
        self._tensors = {}
        if self._owned is None:
            self._owned = self._divided()
        own = {n for n, owned in self._owned.items() if owned.rank == self._rank}
        for name, tensor, _ in self._exported():
            if name in own:
                self._tensors[name] = _alone(tensor)

    def infos(self) -> Iterator[TensorInfo]:
        """Yield this rank's tensors, each with the reason why it is gathered."""
        for owned in (self._owned or {}).values():
            if owned.rank == self._rank:
                yield owned.info

    def boxes(self) -> Iterator[Box]:
        """Yield one box per tensor of this rank."""
        for info in self.infos():
            strides = [math.prod(info.shape[dim + 1 :]) for dim in range(len(info.shape))]
            at = Placement(GATHERED + info.name, 0, tuple(strides))
            yield Box(info.name, (0,) * len(info.shape), info.shape, at)

    def take(self) -> dict[str, torch.Tensor]:
        """Hand over this rank's tensors, by storage; they are not kept."""
        taken, self._tensors = self._tensors, {}
        return {GATHERED + name: tensor for name, tensor in taken.items()}

    def _exported(self) -> Iterator[tuple[str, torch.Tensor, str]]:
        """Yield each tensor's name, the tensor, and why it is gathered."""
        reason = ""

        def fed() -> Iterator[Any]:
            nonlocal reason
            for loose in self._tasks:
                reason = loose.reason
                yield replace(loose.task, param_weight=loose.live())

        exported = self._bridge.export_hf_weights(
            self._chunks, show_progress=False, conversion_tasks=fed(), merge_adapter_weights=False
        )
        for name, tensor in exported:
            yield name, tensor, reason

    def _divided(self) -> dict[str, Owned]:
        """Export once, keep nothing, and agree on an owner for each tensor."""
        found: list[Any] = []
        error: Fp8SyncError | None = None
        try:
            found += [
                [name, list(t.shape), str(t.dtype).removeprefix("torch."), reason]
                for name, t, reason in self._exported()
            ]
        except Exception as fault:  # noqa: BLE001  (all ranks raise it below)
            error = Fp8SyncError(
                f"trainer rank {self._rank}: the bridge's export failed: {fault!r}"
            )
        told = exchange({"found": found, "error": error and error.to_wire()})
        for said in told:
            if said["error"] is not None:
                raise from_wire(said["error"])
        return divide([said["found"] for said in told])


def divide(found: Sequence[Sequence[Sequence[Any]]]) -> dict[str, Owned]:
    """Give each tensor to the rank with the least so far, among those that the export gives it to.

    Args:
        found: by rank, `[name, shape, dtype, reason]` of what it was given.

    Raises:
        UnsupportedLayout: ranks are given different tensors under one name, or one cannot travel.
    """
    infos: dict[str, TensorInfo] = {}
    holders: dict[str, list[int]] = {}
    faults = []
    for rank, rows in enumerate(found):
        for name, shape, dtype, reason in rows:
            info = TensorInfo(name, tuple(shape), dtype, misc=reason)
            known = infos.setdefault(name, info)
            holders.setdefault(name, []).append(rank)
            if known.shape != info.shape or known.dtype != dtype:
                faults.append(
                    f"{name}: trainer rank {holders[name][0]} is given {known.dtype} "
                    f"{list(known.shape)}, trainer rank {rank} {dtype} {shape}"
                )
    faults += [
        f"{n}: dtype {i.dtype} cannot travel" for n, i in infos.items() if i.dtype not in ITEMSIZE
    ]
    if faults:
        raise UnsupportedLayout("the bridge's export cannot be sent", faults)
    given = [0] * len(found)
    owned = {}
    for name, info in infos.items():
        rank = min(holders[name], key=lambda r: (given[r], r))
        given[rank] += info.numel * ITEMSIZE[info.dtype]
        owned[name] = Owned(info, rank)
    return owned


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor that keeps no larger one alive."""
    made = tensor.detach().contiguous()
    return made if made.untyped_storage().nbytes() == made.nbytes else made.clone()
