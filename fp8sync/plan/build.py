"""The plan: every overlap of a source box with a destination box is one copy.

Pure data from pure data: no tensors, no devices, the same on every rank. Its digest, one per
destination rank, is compared by both sides before a byte moves.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo, canonical_json
from fp8sync.plan.amax import AmaxGroup, CutBlocks, amax_groups, cut_blocks
from fp8sync.plan.boxes import block_shape, contiguous, misaligned_dim, span
from fp8sync.plan.copy import Copy
from fp8sync.plan.formats import MISC, agree_on_tensors
from fp8sync.plan.route import Router, first_senders, sender
from fp8sync.plan.spread import Spread, holdings, unsliced_pairs
from fp8sync.recipe import BLOCK, Encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from fp8sync.plan.boxes import Rect

__all__ = ["Plan", "Planner", "build_plan", "to_fill"]


@dataclass(frozen=True)
class Plan:
    """All copies of a refit, in wire order, and the tensors they carry.

    `amax` lists the blocks whose amax trainer ranks have to agree on before they quantize. A tensor
    with a `misc` reason lands whole in a storage `misc/<name>`, for the engine's own loader; of one that
    is `unused` there is no copy.
    """

    tensors: Mapping[str, TensorInfo]
    copies: tuple[Copy, ...]
    amax: tuple[AmaxGroup, ...] = ()

    @cached_property
    def _by_destination(self) -> dict[int, tuple[Copy, ...]]:
        found: dict[int, list[Copy]] = defaultdict(list)
        for copy in self.copies:
            found[copy.destination_rank].append(copy)
        return {rank: tuple(copies) for rank, copies in found.items()}

    def to_rank(self, destination_rank: int) -> tuple[Copy, ...]:
        """Return the copies that arrive at one destination rank."""
        return self._by_destination.get(destination_rank, ())

    def fed(self, destination_rank: int) -> tuple[Copy, ...]:
        """Return the copies that trainer ranks send to one destination rank."""
        return tuple(copy for copy in self.to_rank(destination_rank) if copy.via is None)

    def is_cut(self, copy: Copy) -> bool:
        """Whether `copy` begins or ends inside a block: it is quantized with a given amax then.

        Its own `partial_amax` holds for the blocks that no group of `amax` lists.
        """
        if copy.encoding is not Encoding.BLOCKWISE:
            return False
        return misaligned_dim(copy.rect, self.tensors[copy.tensor].shape) is not None

    def sent_by(self, source_rank: int) -> Plan:
        """Return the plan with the copies of one trainer rank alone."""
        own = tuple(copy for copy in self.copies if copy.source_rank == source_rank)
        return replace(self, copies=own)

    def digests(self, destination_rank: int, source_rank: int | None = None) -> dict[str, str]:
        """Return one SHA-256 per tensor over the copies to `destination_rank`, of all trainer ranks or of one."""
        copies = self.to_rank(destination_rank)
        if source_rank is not None:
            copies = tuple(copy for copy in copies if copy.source_rank == source_rank)
        return _by_tensor(copies)

    def digest(self, destination_rank: int) -> str:
        """Return the SHA-256 of `digests(destination_rank)`, in hex."""
        return self._summed(destination_rank)[0]

    def share_digests(self, source_rank: int) -> dict[int, str]:
        """Return, by destination, the SHA-256 over the copies that one trainer rank sends there, in hex."""
        shares = {rank: self._summed(rank)[1].get(source_rank) for rank in self._by_destination}
        return {rank: digest for rank, digest in shares.items() if digest}

    def _summed(self, destination_rank: int) -> tuple[str, dict[int, str]]:
        """The digest of all that arrives at a rank, and of each trainer rank's share of it."""
        if destination_rank not in self._sums:
            tensors: dict[str, Any] = defaultdict(hashlib.sha256)
            shares: dict[int, Any] = defaultdict(hashlib.sha256)
            for copy in self.to_rank(destination_rank):
                data = canonical_json(copy.to_json())
                tensors[copy.tensor].update(data)
                shares[copy.source_rank].update(data)
            joint = _joint({name: h.hexdigest() for name, h in tensors.items()})
            found = joint, {rank: h.hexdigest() for rank, h in shares.items()}
            self._sums[destination_rank] = found
        return self._sums[destination_rank]

    @cached_property
    def _sums(self) -> dict[int, tuple[str, dict[int, str]]]:
        return {}

    def amax_digests(self) -> dict[str, str]:
        """Return one SHA-256 per tensor over its groups of `amax`."""
        return _by_tensor(self.amax)

    def amax_digest(self) -> str:
        """Return the SHA-256 of `amax_digests()`, in hex; for trainer ranks alone, who exchange amax."""
        return _joint(self.amax_digests())


def _by_tensor(parts: Iterable[Copy | AmaxGroup]) -> dict[str, str]:
    hashes: dict[str, Any] = defaultdict(hashlib.sha256)
    for part in parts:
        hashes[part.tensor].update(canonical_json(part.to_json()))
    return {name: h.hexdigest() for name, h in hashes.items()}


def _joint(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical_json(list(digests.items()))).hexdigest()


def build_plan(
    source: Manifest,
    destination: Manifest,
    *,
    exchange_amax: bool = False,
    requantize: bool = False,
) -> Plan:
    """Intersect two manifests.

    Args:
        source: the trainer's boxes, all ranks.
        destination: the engine's boxes, of one rank or of all.
        exchange_amax: whether the trainer's ranks can exchange `Plan.amax`, and packing quantizes with
            it. Without, a block that the trainer's boxes cut is refused.
        requantize: whether FP8 pairs that do not fit are quantized anew, or dequantized.

    Raises:
        TensorMismatch: a tensor is missing on one side, or shapes differ.
        RecipeMismatch: an FP8 pair that the engine would have to convert.
        UnsupportedLayout: source boxes leave a hole, an engine's box cuts a 128-block, or a trainer's
            does and `exchange_amax` is not given.
    """
    planner = Planner(source, exchange_amax=exchange_amax, requantize=requantize)
    return planner.plan(destination)


class Planner:
    """Plans against one trainer, as often as asked: for all engine ranks, or for one at a time.

    A rank's copies are the same either way. So an engine worker plans what arrives at it, a trainer rank
    what it sends, and only trainer rank 0, which orders messages and compares, plans for all.

    Args:
        source: the trainer's boxes, all ranks.
        exchange_amax: see `build_plan`.
        requantize: see `build_plan`.
    """

    def __init__(
        self, source: Manifest, *, exchange_amax: bool = False, requantize: bool = False
    ) -> None:
        self._source, self._exchange_amax = source, exchange_amax
        self._requantize = requantize
        self._held = holdings(source)
        self._spreads = {name: h.spread for name, h in self._held.items()}
        self._first = first_senders(self._spreads)
        self._unsliced = unsliced_pairs(source)
        self._router = Router()
        self._cuts: dict[Spread, tuple[CutBlocks, ...]] = {}

    def plan(self, destination: Manifest, source_rank: int | None = None) -> Plan:
        """Return the plan for a destination.

        Args:
            destination: the engine's boxes, of one rank or of all.
            source_rank: if given, only the copies that this trainer rank sends. Amax groups are of all
                ranks: who exchanges with whom follows from all of them.

        Raises:
            TensorMismatch, RecipeMismatch, UnsupportedLayout: see `build_plan`.
        """
        infos = agree_on_tensors(
            self._source.tensors,
            destination.tensors,
            self._spreads,
            self._unsliced,
            requantize=self._requantize,
        )
        own = None if source_rank is None else self._tensors_of(source_rank)
        copies: list[Copy] = []
        faults: list[str] = []
        for rank, boxes in destination.ranks.items():
            for box in to_fill(boxes, infos):
                if own is None or box.tensor in own:
                    copies += self._copies(rank, box, infos[box.tensor], faults, source_rank)
        if faults:
            raise UnsupportedLayout("the layouts cannot be joined exactly", faults)
        copies.sort(key=_route)
        wanted = {b.tensor for boxes in destination.ranks.values() for b in boxes}
        groups = [group for name in infos if name in wanted for group in self._amax(infos[name])]
        return Plan(infos, tuple(copies), tuple(groups))

    def _tensors_of(self, rank: int) -> set[str]:
        return {box.tensor for box in self._source.ranks.get(rank, ())}

    def _copies(
        self, rank: int, box: Box, info: TensorInfo, faults: list[str], only: int | None
    ) -> list[Copy]:
        wanted = box.start, box.shape
        held = self._held.get(box.tensor)
        filling = self._router.fill(held.spread, wanted, info.shape) if held else None
        if held is None or filling is None or not filling.whole:
            faults.append(
                f"{box.tensor}: engine rank {rank} needs {span(wanted)}; "
                "the trainer's boxes do not cover it"
            )
            return []
        first = self._first[box.tensor]
        pair = self._source.tensors[box.tensor].encoding is Encoding.BLOCKWISE
        copies = []
        for part in filling.parts:
            i, j = sender(part.owners, first, rank)
            source_rank = held.spread.ranks[i][j]
            if only is not None and source_rank != only:
                continue
            owner = held.boxes[i][j]
            if pair and owner.scale_at is None:
                faults.append(
                    f"{box.tensor}: trainer rank {source_rank} holds codes without scales"
                )
            anew = pair and info.formula != self._source.tensors[box.tensor].formula
            copies.append(_copy(part.rect, source_rank, owner, rank, box, info, pair, anew=anew))
        if filling.cut and info.encoding is Encoding.BLOCKWISE:
            faults += self._cut_faults(box, rank, info, copies)
        return copies

    def _cut_faults(
        self, box: Box, rank: int, info: TensorInfo, copies: Sequence[Copy]
    ) -> Iterator[str]:
        if not self._exchange_amax:
            for copy in copies:
                if (dim := misaligned_dim(copy.rect, info.shape)) is not None:
                    yield (
                        f"{box.tensor}: copy {span(copy.rect)} from rank {copy.source_rank} to "
                        f"engine rank {rank} cuts a {BLOCK}-block in dim {dim}"
                    )
        elif (dim := misaligned_dim((box.start, box.shape), info.shape)) is not None:
            yield (
                f"{box.tensor}: engine rank {rank} wants {span((box.start, box.shape))}, which "
                f"cuts a {BLOCK}-block in dim {dim}"
            )

    def _amax(self, info: TensorInfo) -> Iterator[AmaxGroup]:
        held = self._held.get(info.name)
        if held is None or info.encoding is not Encoding.BLOCKWISE:
            return iter(())
        if held.spread not in self._cuts:
            self._cuts[held.spread] = cut_blocks(held.spread, info.shape)
        return amax_groups(info.name, held, self._cuts[held.spread])


def _route(copy: Copy) -> tuple[int, int]:
    return copy.destination_rank, copy.source_rank


def to_fill(boxes: Sequence[Box], infos: Mapping[str, TensorInfo]) -> Iterator[Box]:
    """Yield the boxes of an engine's rank that a plan fills.

    What is on the misc path for a reason that is not the rank's own (the plan's, or another rank's) comes
    whole, in place of the boxes that the rank lists; and without scales where the plan sends values for what
    the rank wanted as a pair.

    Args:
        boxes: as the rank lists them.
        infos: the plan's tensors.
    """
    seen = set()
    for box in boxes:
        info = infos[box.tensor]
        scales = box.scale_at is not None and info.encoding is Encoding.BLOCKWISE
        if not info.misc:
            yield box
        elif box.at.storage.startswith(MISC):
            yield box if scales else replace(box, scale_at=None)
        elif box.tensor not in seen:
            seen.add(box.tensor)
            yield _misc_box(info, scales=scales)


def _misc_box(info: TensorInfo, *, scales: bool) -> Box:
    at = Placement(MISC + info.name, 0, contiguous(info.shape))
    scale_at = None
    if scales:
        strides = contiguous(block_shape(info.shape))
        scale_at = Placement(f"{MISC}{info.name}_scale_inv", 0, strides)
    return Box(info.name, (0,) * len(info.shape), info.shape, at, scale_at)


def _copy(
    part: Rect,
    source_rank: int,
    owner: Box,
    rank: int,
    box: Box,
    info: TensorInfo,
    pair: bool,
    *,
    anew: bool,
) -> Copy:
    start, shape = part
    blockwise = info.encoding is Encoding.BLOCKWISE
    source_at, at, scale_at = owner.at, box.at, box.scale_at
    source_scale_at = owner.scale_at if pair else None
    source_origin: tuple[int, ...] = ()
    index = _difference(start, owner.start)
    if start != owner.start:
        source_at = source_at.at(index)
    if source_scale_at is not None:
        origin = owner.scale_origin or tuple(a % BLOCK for a in owner.start)
        local = [i + o for i, o in zip(index, origin, strict=True)]
        source_scale_at = source_scale_at.at([i // BLOCK for i in local])
        source_origin = tuple(i % BLOCK for i in local) if anew else ()
    if start != box.start:
        at = at.at(_difference(start, box.start))
        if scale_at is not None:
            # The first block carried is the first that begins within the copy.
            blocks = zip(start, box.start, strict=True)
            scale_at = scale_at.at([-(-a // BLOCK) - b // BLOCK for a, b in blocks])
    return Copy(
        box.tensor,
        start,
        shape,
        "float8_e4m3fn" if blockwise else info.dtype,
        info.encoding,
        info.formula,
        source_rank,
        source_at,
        rank,
        at,
        scale_at,
        source_scale_at,
        source_origin,
    )


def _difference(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x - y for x, y in zip(a, b, strict=True)]
