"""What a refit will move, from geometry alone: bytes per link, messages, memory.

No copy is made: tensors that lie alike on both sides are counted together, so the traffic of a model
of 45,000 tensors between a thousand ranks and five hundred takes seconds.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import ITEMSIZE
from fp8sync.plan.amax import cut_blocks
from fp8sync.plan.boxes import block_shape, misaligned_dim, span, volume
from fp8sync.plan.bucket import DEFAULT_BUCKET_BYTES
from fp8sync.plan.copy import carried_blocks
from fp8sync.plan.formats import agree_on_tensors
from fp8sync.plan.route import Filling, PartOf, Router, first_senders, sender
from fp8sync.plan.spread import Spread
from fp8sync.recipe import Encoding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fp8sync.manifest import TensorInfo
    from fp8sync.plan.boxes import Rect
    from fp8sync.plan.spread import Side

__all__ = ["AmaxTraffic", "Traffic", "traffic"]

_NOWHERE = Spread((), ())


@dataclass(frozen=True)
class AmaxTraffic:
    """Blocks that lie on several trainer ranks, before they are quantized."""

    tensors: int = 0
    groups: int = 0
    blocks: int = 0


@dataclass(frozen=True)
class Traffic:
    """What a refit moves.

    Args:
        tensors: as they will be sent; `misc` gives the reason for the engine's own loader.
        links: bytes from a trainer rank to an engine rank, scales included, if trainers send everything.
        copies: rectangles moved.
        staged: bytes that each engine rank holds until it commits.
        held: bytes of the trainer's own weights, by rank.
        amax: the exchange before cut blocks are quantized.
        bucket_bytes: payload of a message.
        fed: as `links`, if each node is fed once with what several of its engine ranks want; empty
            where none do.
        forwards: bytes that go from one engine rank to another then. Tensors that are alike are dealt
            evenly; the plan of a link deals them one by one.
    """

    tensors: Mapping[str, TensorInfo]
    links: Mapping[tuple[int, int], int]
    copies: int
    staged: Mapping[int, int]
    held: Mapping[int, int]
    amax: AmaxTraffic = field(default_factory=AmaxTraffic)
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    fed: Mapping[tuple[int, int], int] = field(default_factory=dict)
    forwards: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes on all links together."""
        return sum(self.links.values())

    @property
    def messages(self) -> int:
        """Buckets on all links together, if each is filled."""
        return sum(-(-n // self.bucket_bytes) for n in self.links.values())

    @property
    def misc(self) -> dict[str, str]:
        """Tensors of the misc path, with the reason."""
        return {n: i.misc for n, i in self.tensors.items() if i.misc}

    def sent(self) -> Counter[int]:
        """Return the bytes that leave each trainer rank."""
        out: Counter[int] = Counter()
        for (source, _), nbytes in self.links.items():
            out[source] += nbytes
        return out

    def received(self) -> Counter[int]:
        """Return the bytes that enter each engine rank."""
        into: Counter[int] = Counter()
        for (_, destination), nbytes in self.links.items():
            into[destination] += nbytes
        return into


@dataclass(frozen=True)
class _Kind:
    """What tensors that are counted together have in common."""

    source: Spread
    destination: Spread
    first: tuple[int, ...]
    shape: tuple[int, ...]
    encoding: Encoding
    item_bytes: int
    scaled: bool
    whole: bool

    def sender(self, part: PartOf, rank: int) -> int:
        """Return the trainer rank whose turn it is to send a part to an engine rank."""
        i, j = sender(part.owners, self.first, rank)
        return self.source.ranks[i][j]


class _Relay:
    """Links where every node is fed once."""

    def __init__(self, gpus_per_node: int) -> None:
        self._per_node = gpus_per_node
        self._load: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self._nodes: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self._spared: Counter[tuple[int, int]] = Counter()
        self.forwards: Counter[tuple[int, int]] = Counter()

    def share(self, senders: Mapping[int, int], nbytes: int, count: int) -> None:
        """Add a part of `count` tensors alike, dealt evenly among those of each node who want it.

        Args:
            senders: by engine rank that wants the part, the trainer rank that would send it there.
            nbytes: of one tensor's part.
            count: of tensors.
        """
        for sharers in self._by_node(tuple(senders)):
            load = self._load[sharers]
            for rank in sharers:
                self._spared[senders[rank], rank] += nbytes * count
            each, more = divmod(count, len(sharers))
            for place, rank in enumerate(sorted(sharers, key=load.__getitem__)):
                own = nbytes * (each + (place < more))
                if own:
                    load[rank] += own
                    self._spared[senders[rank], rank] -= own
                    self.forwards.update({(rank, other): own for other in sharers if other != rank})

    def fed(self, links: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], int]:
        """Return the links that are left of `links`."""
        left = ((link, nbytes - self._spared[link]) for link, nbytes in links.items())
        return {link: nbytes for link, nbytes in left if nbytes}

    def _by_node(self, ranks: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return who of `ranks` share a node with another one of them."""
        found = self._nodes.get(ranks)
        if found is None:
            nodes: dict[int, list[int]] = defaultdict(list)
            for rank in ranks:
                nodes[rank // self._per_node].append(rank)
            shared = [tuple(sorted(n)) for n in nodes.values() if len(n) > 1]
            found = self._nodes[ranks] = shared
        return found


def traffic(
    source: Side,
    destination: Side,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    gpus_per_node: int = 1,
    *,
    requantize: bool = False,
) -> Traffic:
    """Count what a refit from `source` to `destination` will move.

    Args:
        source: the trainer's geometry, all ranks.
        destination: the engine's, all ranks (of several engines, if they are fed together).
        bucket_bytes: payload of a message.
        gpus_per_node: engine ranks fill nodes in order.
        requantize: see `build_plan`.

    Raises:
        TensorMismatch, RecipeMismatch, UnsupportedLayout: see `build_plan`.
    """
    held = source.tensors, destination.tensors, source.spreads, source.unsliced
    infos = agree_on_tensors(*held, requantize=requantize)
    kinds = _kinds(source, destination, infos)
    router = Router()
    links: Counter[tuple[int, int]] = Counter()
    relay = _Relay(gpus_per_node)
    staged: Counter[int] = Counter()
    copies = 0
    faults: list[str] = []
    for kind, names in kinds.items():
        count = len(names)
        for rect, ranks in _wanted(kind):
            filling = router.fill(kind.source, rect, kind.shape)
            fault = _fault(rect, filling, kind)
            if fault:
                faults += [f"{name}: engine rank {ranks[0]} {fault}" for name in names]
                continue
            copies += count * len(filling.parts) * len(ranks)
            for part in filling.parts:
                nbytes = count * _part_bytes(part, kind)
                senders = {rank: kind.sender(part, rank) for rank in ranks}
                for rank, source_rank in senders.items():
                    links[source_rank, rank] += nbytes
                relay.share(senders, nbytes // count, count)
            nbytes = count * (
                volume(rect) * kind.item_bytes + 4 * kind.scaled * math.prod(block_shape(rect[1]))
            )
            for rank in ranks:
                staged[rank] += nbytes
    if faults:
        raise UnsupportedLayout("the layouts cannot be joined exactly", faults)
    amax = _amax(source, infos)
    about = infos, links, copies, staged, _held(source), amax, bucket_bytes
    if not relay.forwards:
        return Traffic(*about)
    return Traffic(*about, relay.fed(links), relay.forwards)


def _kinds(
    source: Side, destination: Side, infos: Mapping[str, TensorInfo]
) -> dict[_Kind, list[str]]:
    first = first_senders(source.spreads)
    kinds: dict[_Kind, list[str]] = defaultdict(list)
    for name, info in infos.items():
        if name not in destination.spreads:
            continue
        kind = _Kind(
            source.spreads.get(name, _NOWHERE),
            destination.spreads[name],
            first.get(name, ()),
            info.shape,
            info.encoding,
            ITEMSIZE[info.dtype],
            info.encoding is Encoding.BLOCKWISE and info.dtype == "float8_e4m3fn",
            # Ranks that do not put it on the misc path themselves still have their bulk boxes.
            bool(info.misc),
        )
        kinds[kind].append(name)
    return kinds


def _wanted(kind: _Kind) -> Iterator[tuple[Rect, tuple[int, ...]]]:
    if not kind.whole:
        yield from zip(kind.destination.rects, kind.destination.ranks, strict=True)
        return
    ranks = {r for holders in kind.destination.ranks for r in holders}
    yield ((0,) * len(kind.shape), kind.shape), tuple(sorted(ranks))


def _fault(rect: Rect, filling: Filling, kind: _Kind) -> str:
    if not filling.whole:
        return f"needs {span(rect)}; the trainer's boxes do not cover it"
    if (
        kind.encoding is Encoding.BLOCKWISE
        and (dim := misaligned_dim(rect, kind.shape)) is not None
    ):
        return f"wants {span(rect)}, which cuts a block in dim {dim}"
    return ""


def _part_bytes(part: PartOf, kind: _Kind) -> int:
    if kind.encoding is not Encoding.BLOCKWISE:
        return volume(part.rect) * kind.item_bytes
    blocks = carried_blocks(part.rect, whole_grid=not kind.scaled)
    return volume(part.rect) + 4 * math.prod(blocks[1])


def _held(source: Side) -> Counter[int]:
    held: Counter[int] = Counter()
    sizes = Counter(
        (source.spreads[n], i.dtype) for n, i in source.tensors.items() if n in source.spreads
    )
    for (spread, dtype), count in sizes.items():
        for rect, ranks in zip(spread.rects, spread.ranks, strict=True):
            for rank in ranks:
                held[rank] += count * volume(rect) * ITEMSIZE[dtype]
    return held


def _amax(source: Side, infos: Mapping[str, TensorInfo]) -> AmaxTraffic:
    count = Counter(
        (source.spreads[n], i.shape)
        for n, i in infos.items()
        if i.encoding is Encoding.BLOCKWISE and source.tensors[n].encoding is Encoding.PLAIN
        if n in source.spreads
    )
    tensors = groups = blocks = 0
    for (spread, shape), number in count.items():
        cuts = cut_blocks(spread, shape)
        tensors += number * bool(cuts)
        for cut in cuts:
            replicas = {len(spread.ranks[i]) for i, _ in cut.parts}
            groups += number * (replicas.pop() if len(replicas) == 1 else 1)
            blocks += number * volume(cut.blocks)
    return AmaxTraffic(tensors, groups, blocks)
