"""Blocks that lie on several trainer ranks: before each refit their holders agree on every block's amax.

Ranks that share a block, directly or through others, form a team. A team takes one element-wise maximum
per refit, over one packed vector, whatever the number of tensors; no rank is in two teams, so no order of
exchanges can deadlock. The first value says whether some rank failed before it could take part: then
all learn it at once, instead of waiting for it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import torch

from fp8sync.errors import Fp8SyncError, PeerFailed
from fp8sync.manifest import Placement
from fp8sync.plan import teams
from fp8sync.plan.boxes import touched_blocks
from fp8sync.recipe import BLOCK
from fp8sync.sending.alike import Alike
from fp8sync.sending.look import Look
from fp8sync.waiting import device_work, waiting
from fp8sync.wire.payload import view
from fp8sync.wire.tables import matrix
from fp8sync_kernels import Table, build_table, job, partial_amax, run_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8sync.plan import AmaxGroup, AmaxPart
    from fp8sync.wire.payload import Amax, Storages

__all__ = ["AmaxExchange", "Team", "open_exchange"]


class Team(Protocol):
    """The ranks that exchange with one another."""

    def maximum(self, values: torch.Tensor) -> None:
        """Replace `values`, contiguous, by their element-wise maximum over all members."""

    def close(self) -> None:
        """End what is under way."""


class AmaxExchange:
    """One trainer rank's part in agreeing on the amax of cut blocks.

    Args:
        groups: of this rank's team, in an order that all its members use.
        rank: this rank among the trainer's.
        team: to exchange with; None where nobody else holds a part.
        device: where this rank's weights are.

    `alike` knows how this rank's weights lay when the link was made, for all who read them.
    """

    def __init__(
        self, groups: Sequence[AmaxGroup], rank: int, team: Team | None, device: torch.device
    ) -> None:
        self._rank, self._team, self._device = rank, team, device
        self.alike = Alike(rank)
        sizes = [math.prod(group.shape) for group in groups]
        self._joint = torch.zeros(1 + sum(sizes), dtype=torch.float32, device=device)
        self._parts: list[tuple[AmaxPart, int, AmaxGroup, int]] = []
        amax: dict[str, list[tuple[AmaxGroup, torch.Tensor]]] = defaultdict(list)
        offset = 1
        for group, size in zip(groups, sizes, strict=True):
            own = [part for part in group.parts if part.rank == rank]
            self._parts += [(part, plane, group, offset) for plane, part in enumerate(own)]
            if own:
                joint = self._joint[offset : offset + size].view(group.shape)
                amax[group.tensor].append((group, joint))
            offset += size
        self.amax: Amax = dict(amax)
        # A rank may hold several parts of a block; each has a plane of its own.
        depth = 1 + max((plane for _, plane, _, _ in self._parts), default=0)
        self._planes = torch.zeros(depth, offset, dtype=torch.float32, device=device)
        self._names = list(dict.fromkeys(part.at.storage for part, _, _, _ in self._parts))
        self._look: Look | None = None
        self._table: Table | None = None
        self._strided: list[tuple[AmaxPart, torch.Tensor]] = []

    def agree(self, read: Callable[[], Storages]) -> Storages:
        """Bring `amax` up to date with the storages that `read` returns, and return these.

        Every rank of a team calls it once per refit. A rank whose `read` fails takes part all the same.

        Raises:
            TensorMismatch: weights with cut blocks lie otherwise than when they were first looked at.
            PeerFailed: another rank of the team failed before it could take part.
            TransferTimeout, EngineLost: another rank is late, or gone.
        """
        try:
            storages = read()
            self._measure(storages)
        except Exception:
            if self._team is not None:
                self._joint.zero_()[0] = self._rank + 1
                with suppress(Fp8SyncError):
                    self._team.maximum(self._joint)
            raise
        if self._team is not None:
            self._team.maximum(self._joint)
            with waiting():
                failed = int(self._joint[0])
            if failed:
                raise PeerFailed(f"trainer rank {failed - 1} failed before amax was exchanged")
        return storages

    def close(self) -> None:
        """Leave the team."""
        if self._team is not None:
            self._team.close()

    def _measure(self, storages: Storages) -> None:
        """Put this rank's share of every block's amax into the packed vector."""
        if self._team is None and not self._parts:
            return
        self._prepare(storages)
        with device_work(self._device):
            if self._table is not None:
                run_table(self._table, None, None)
            for part, target in self._strided:
                x = view(storages, part.at, part.shape)
                target.copy_(partial_amax(x, origin=_origin(part)))
            torch.amax(self._planes, 0, out=self._joint)

    def _prepare(self, storages: Storages) -> None:
        """Lay out the launch, unless the weights still lie where they lay."""
        if self._look is not None and self._look.holds(storages):
            return
        self._look = None  # should it fail half-way
        look = Look(storages, self._names)
        self.alike.check(storages, self._names)
        jobs, self._strided = [], []
        for part, plane, group, offset in self._parts:
            first, blocks = touched_blocks((part.start, part.shape))
            within = [a - b for a, b in zip(first, group.start, strict=True)]
            at = Placement("", offset, (group.shape[1], 1)).at(within)
            if part.at.strides[-1] != 1 and part.shape[-1] > 1:
                planes = {"": self._planes[plane]}
                self._strided.append((part, view(planes, at, blocks)))
                continue
            storage = storages[part.at.storage]
            dtype = str(storage.dtype).removeprefix("torch.")
            x = matrix(storage.data_ptr(), part.at, part.shape, dtype)
            out = matrix(self._planes[plane].data_ptr(), at, blocks, "float32")
            jobs.append(job.partial_amax(x, out, origin=_origin(part)))
        self._table = build_table(jobs, self._device) if jobs else None
        self._look = look


def open_exchange(
    groups: Sequence[AmaxGroup],
    rank: int,
    device: torch.device,
    join: Callable[[tuple[int, ...]], Team],
) -> AmaxExchange:
    """Find this rank's team and join it; every rank calls it with the same groups.

    Args:
        groups: `Plan.amax` of all ranks.
        rank: this rank among the trainer's.
        device: where its weights are.
        join: returns the team of these ranks, this one among them.
    """
    for ranks, members in teams(groups).items():
        if rank in ranks:
            team = join(ranks) if len(ranks) > 1 else None
            try:
                return AmaxExchange(members, rank, team, device)
            except BaseException:
                if team is not None:
                    team.close()
                raise
    return AmaxExchange((), rank, None, device)


def _origin(part: AmaxPart) -> tuple[int, int]:
    row, col = (a % BLOCK for a in part.start)
    return row, col
