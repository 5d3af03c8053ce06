"""Which GPU each member of `refit.py` lies on, and the bytes that have to cross between GPUs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8sync.plan import Plan

__all__ = ["Traffic", "placed", "processes_of", "traffic"]


def placed(stage: int, trainers: int, workers: int, gpus: int) -> list[int]:
    """The GPU of each trainer rank, then of each worker; `stage` ranks form a pipeline stage.

    One each, if there are as many. Else crosswise: workers, and likewise the ranks of every stage, are dealt
    out in order, ranks beginning with the second GPU. So between layouts that cut alike every byte crosses,
    and on two GPUs in both directions.
    """
    if trainers + workers <= gpus:
        return list(range(trainers + workers))
    ranks = [(1 + r % stage * gpus // stage) % gpus for r in range(trainers)]
    return ranks + [w * gpus // workers for w in range(workers)]


def processes_of(lying: Sequence[int], gpus: int) -> list[int]:
    """The process that each member is, of processes p that have GPU p modulo `gpus`."""
    taken: Counter[int] = Counter()
    found = []
    for gpu in lying:
        found.append(gpu + gpus * taken[gpu])
        taken[gpu] += 1
    return found


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights and scales, by GPU: that leave it for others, and that it takes from others."""

    out: Counter[int]
    into: Counter[int]
    stayed: int

    @property
    def most(self) -> int:
        """On the busiest direction of any GPU's link."""
        return max([*self.out.values(), *self.into.values()], default=0)

    @property
    def crossed(self) -> int:
        """On all links together."""
        return self.into.total()


def traffic(plan: Plan, trainers: Sequence[int], workers: Sequence[int]) -> Traffic:
    """What a plan moves between GPUs, if its trainer ranks and workers lie on these."""
    out: Counter[int] = Counter()
    into: Counter[int] = Counter()
    stayed = 0
    for copy in plan.copies:
        nbytes = copy.weight_bytes + copy.scale_bytes
        source = trainers[copy.source_rank] if copy.via is None else workers[copy.via]
        destination = workers[copy.destination_rank]
        if source == destination:
            stayed += nbytes
        else:
            out[source] += nbytes
            into[destination] += nbytes
    return Traffic(out, into, stayed)
