"""Workers of one node that want the same bytes: the node is fed once, and they hand on to one another.

Who hands on what follows from the copies that are shared and from nothing else. So a worker that knows its
own copies, and who else on its node wants them, finds the same answer as a trainer rank that knows all.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fp8sync.manifest import canonical_json
from fp8sync.recipe import Encoding

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

    from fp8sync.plan.build import Plan
    from fp8sync.plan.copy import Copy

__all__ = [
    "as_runs",
    "deal",
    "forwarding_digest",
    "forwarding_rows",
    "from_runs",
    "handed_on",
    "marks_of",
    "shared",
    "with_forwarding",
    "with_marks",
]

Ranks = tuple[int, ...]
_Key = tuple[str, tuple[int, ...], tuple[int, ...], int]


def shared(plan: Plan, nodes: Mapping[int, Hashable]) -> dict[int, list[Ranks]]:
    """Return, for every engine rank and each of its copies, the ranks of its node that want the same.

    The rank itself is one of them. A copy of another rectangle is another one, also where they overlap.

    Args:
        plan: of all engine ranks.
        nodes: the node of every engine rank.
    """
    who: dict[Any, list[int]] = defaultdict(list)
    keys = [
        (nodes[copy.destination_rank], copy.scale_at is None, key) for copy, key in _keyed(plan)
    ]
    for copy, key in zip(plan.copies, keys, strict=True):
        who[key].append(copy.destination_rank)
    found: dict[int, list[Ranks]] = defaultdict(list)
    for copy, key in zip(plan.copies, keys, strict=True):
        found[copy.destination_rank].append(tuple(sorted(who[key])))
    return dict(found)


def with_forwarding(plan: Plan, sharers: Mapping[int, Sequence[Ranks]]) -> Plan:
    """Return the plan with every shared copy sent to one of its sharers, who hands it on to the others.

    Args:
        plan: of all engine ranks, or of one.
        sharers: `shared`, of the same ranks.
    """
    turn: Counter[int] = Counter()
    listed: list[tuple[Copy, _Key, Ranks]] = []
    sizes: dict[Ranks, dict[_Key, int]] = defaultdict(dict)
    for copy, key in _keyed(plan):
        rank = copy.destination_rank
        ranks = sharers[rank][turn[rank]]
        turn[rank] += 1
        listed.append((copy, key, ranks))
        if len(ranks) > 1:
            sizes[ranks][key] = copy.weight_bytes + copy.scale_bytes
    first = {ranks: deal(found, ranks) for ranks, found in sizes.items()}
    copies = (_marked(c, first[r][key], r) if len(r) > 1 else c for c, key, r in listed)
    return replace(plan, copies=tuple(copies))


def deal(sizes: Mapping[_Key, int], ranks: Ranks) -> dict[_Key, int]:
    """Return which of `ranks` is sent each copy: large ones first, each to the one with the least so far."""
    load = dict.fromkeys(ranks, 0)
    dealt = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        dealt[key] = min(ranks, key=load.__getitem__)
        load[dealt[key]] += sizes[key]
    return dealt


def handed_on(plan: Plan, source: int, destination: int) -> tuple[Copy, ...]:
    """Return what engine rank `source` hands on to engine rank `destination`, in an order both know.

    A rank's plan of its own copies is enough at either end: at the source's, the copies say where they
    lie, at the destination's, where they go. What a worker has dequantized it hands on as it holds it.
    """
    own = [c for c in plan.to_rank(destination) if c.via == source]
    own = own or [c for c in plan.to_rank(source) if destination in c.onward]
    found = []
    for copy in sorted(own, key=lambda copy: (copy.tensor, copy.start, copy.shape)):
        form = copy.dtype, copy.encoding, copy.formula
        if copy.scale_at is None:
            form = plan.tensors[copy.tensor].dtype, Encoding.PLAIN, None
        dtype, encoding, formula = form
        found.append(
            replace(
                copy,
                dtype=dtype,
                encoding=encoding,
                formula=formula,
                source_rank=source,
                source_at=copy.at,
                destination_rank=destination,
                source_scale_at=copy.scale_at,
                source_origin=(),
                via=None,
                onward=(),
            )
        )
    return tuple(found)


def neighbours(plan: Plan, rank: int) -> list[tuple[int, int]]:
    """Return the (source, destination) pairs of engine ranks of which `rank` is one, sorted."""
    routes = {(c.via, rank) for c in plan.to_rank(rank) if c.via is not None}
    return sorted(routes | {(rank, to) for c in plan.to_rank(rank) for to in c.onward})


def forwarding_rows(copies: Sequence[Copy]) -> list[list[Any]]:
    """Return what both ends know of `handed_on` as JSON-able data: all but where it lies at either."""
    return [
        [
            c.tensor,
            list(c.start),
            list(c.shape),
            c.dtype,
            c.encoding.value,
            c.source_rank,
            c.destination_rank,
        ]
        for c in copies
    ]


def forwarding_digest(copies: Sequence[Copy]) -> bytes:
    """Return the SHA-256 of `forwarding_rows`."""
    return hashlib.sha256(canonical_json(forwarding_rows(copies))).digest()


def as_runs(sharers: Sequence[Ranks]) -> list[list[Any]]:
    """Return one rank's sharers as JSON-able data: `[[[ranks], count], ...]` in the copies' order."""
    return [[list(ranks), len(list(run))] for ranks, run in groupby(sharers)]


def from_runs(runs: Sequence[Sequence[Any]]) -> list[Ranks]:
    """Rebuild sharers from `as_runs`."""
    return [tuple(ranks) for ranks, count in runs for _ in range(count)]


def marks_of(copies: Iterable[Copy]) -> list[list[Any]]:
    """Return how copies are forwarded as JSON-able data: `[[via, [onward], count], ...]` in their order."""
    runs = groupby(copies, lambda copy: (copy.via, copy.onward))
    return [[via, list(onward), len(list(run))] for (via, onward), run in runs]


def with_marks(plan: Plan, marks: Iterable[Sequence[Any]]) -> Plan:
    """Return the plan with its copies forwarded as `marks_of` said.

    Not as many as copies: then the plans differ, which is found when they are compared.
    """
    each = [(via, tuple(onward)) for via, onward, count in marks for _ in range(count)]
    if len(each) != len(plan.copies):
        return plan
    copies = (replace(c, via=v, onward=o) for c, (v, o) in zip(plan.copies, each, strict=True))
    return replace(plan, copies=tuple(copies))


def _keyed(plan: Plan) -> Iterator[tuple[Copy, _Key]]:
    """Yield every copy with what makes it the same as another rank's; tied tensors come several times."""
    seen: Counter[Any] = Counter()
    for copy in plan.copies:
        place = copy.destination_rank, copy.tensor, copy.start, copy.shape
        yield copy, (*place[1:], seen[place])
        seen[place] += 1


def _marked(copy: Copy, first: int, ranks: Ranks) -> Copy:
    if copy.destination_rank != first:
        return replace(copy, via=first)
    return replace(copy, onward=tuple(rank for rank in ranks if rank != first))
