"""A refit in one process: every rank's storages, and the plan carried out between them.

The way data walks is the real one: the exchange of amax over gloo, then buckets (`payload.pack`, bytes,
`payload.unpack`) or the writer's tables over staging memory.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed

from fp8sync.manifest import Manifest, Placement
from fp8sync.plan import MISC, Plan, fill_buckets
from fp8sync.plan.boxes import block_shape, touched_blocks
from fp8sync.recipe import Encoding
from fp8sync.sending.exchange import AmaxExchange, open_exchange
from fp8sync.sending.share import Share
from fp8sync.sending.writer import PARTS, StagingPlace, Writer, as_written
from fp8sync.transport import GlooGroup
from fp8sync.transport.memory import export_memory
from fp8sync.wire.payload import pack, unpack, view
from fp8sync.wire.tables import check_table
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise, run_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8sync.manifest import Box
    from fp8sync.sending.share import Written

dist: Any = torch.distributed
T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
Ranks = dict[int, Tensors]
GUARD = 0xA5


def cut(tensor: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def random_tensors(manifest: Manifest, seed: int = 0) -> Tensors:
    """Full HF tensors in the trainer's dtype, over many binades, so that every block's amax differs."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for info in manifest.tensors.values():
        x = torch.randn(info.shape, generator=generator)
        x *= torch.exp2(torch.randint(-9, 5, info.shape[-1:], generator=generator))
        dtype = torch.bfloat16 if info.encoding is Encoding.BLOCKWISE else _dtype(info.dtype)
        tensors[info.name] = x.to(dtype)
    return tensors


def quantized(manifest: Manifest, tensors: Tensors) -> Tensors:
    """Codes and scales of every blockwise tensor, quantized whole; the others as they are."""
    found = dict(tensors)
    for info in manifest.tensors.values():
        if info.encoding is Encoding.BLOCKWISE:
            q = quantize_blockwise(tensors[info.name], info.formula.value)
            found[info.name] = q.weight
            found[info.name + "_scale_inv"] = q.scale_inv
    return found


def storages(manifest: Manifest, whole: Mapping[str, torch.Tensor] | None) -> Ranks:
    """Every rank's storages: filled from full tensors, or with guard bytes."""
    found: Ranks = {}
    for rank, boxes in manifest.ranks.items():
        sizes: dict[str, int] = defaultdict(int)
        dtypes = {}
        for box in boxes:
            dtypes[box.at.storage] = _dtype(manifest.tensors[box.tensor].dtype)
            _grow(sizes, box.at, box.shape)
            if box.scale_at is not None:
                dtypes[box.scale_at.storage] = torch.float32
                _grow(sizes, box.scale_at, touched_blocks((box.start, box.shape))[1])
        found[rank] = {
            name: torch.full((size * dtypes[name].itemsize,), GUARD, dtype=torch.uint8).view(
                dtypes[name]
            )
            for name, size in sizes.items()
        }
        if whole is not None:
            for box in boxes:
                fill(box, found[rank], whole)
    return found


def fill(box: Box, held: Tensors, whole: Mapping[str, torch.Tensor]) -> None:
    """Put a box's part of the full tensor where the box says."""
    full = whole[box.tensor]
    target = view(held, box.at, box.shape)
    scales = whole.get(box.tensor + "_scale_inv")
    if scales is not None and box.scale_at is None and target.dtype != full.dtype:
        full = dequantize_blockwise(full, scales, target.dtype)  # an engine that holds no FP8
    target.copy_(cut(full, box.start, box.shape))
    if box.scale_at is not None:
        start, shape = touched_blocks((box.start, box.shape))
        view(held, box.scale_at, shape).copy_(cut(scales, start, shape))


def _grow(sizes: dict[str, int], at: Placement, shape: Sequence[int]) -> None:
    if all(shape):
        last = at.offset + sum((n - 1) * s for n, s in zip(shape, at.strides, strict=True))
        sizes[at.storage] = max(sizes[at.storage], last + 1)


def carry_out(plan: Plan, source: Ranks, destination: Ranks, bucket_bytes: int) -> None:
    """Agree on amax, then pack, send and unpack every bucket."""
    exchanges = agree(plan, source)
    for rank in destination:
        for bucket in fill_buckets(plan.to_rank(rank), bucket_bytes):
            payload = torch.zeros(bucket.nbytes, dtype=torch.uint8)
            held = source[bucket.source_rank]
            pack(bucket, held, payload, exchanges[bucket.source_rank].amax)
            unpack(bucket, payload, destination[rank])


def agree(plan: Plan, source: Ranks) -> dict[int, AmaxExchange]:
    """Every rank's amax of cut blocks."""

    def take_part(rank: int, exchange: AmaxExchange) -> AmaxExchange:
        exchange.agree(lambda: source[rank])
        return exchange

    return on_every_rank(plan, source, take_part)


def on_every_rank(plan: Plan, source: Ranks, act: Callable[[int, AmaxExchange], T]) -> dict[int, T]:
    """Let every trainer rank act in a thread of its own; its team meets over gloo."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        def join(ranks: tuple[int, ...]) -> GlooGroup:
            team = dist.PrefixStore(str(ranks[0]), store)
            return GlooGroup(team, ranks.index(rank), len(ranks), "127.0.0.1", 20.0)

        return act(rank, open_exchange(plan.amax, rank, torch.device("cpu"), join))

    with ThreadPoolExecutor(len(source)) as pool:
        return dict(zip(source, pool.map(run, source), strict=True))


def write_out(plan: Plan, source: Ranks, destination: Ranks) -> list[str]:
    """Write one-sided into every engine rank's staging memory; return whose digests differ."""
    arenas, places = {}, {}
    for rank, held in destination.items():
        offsets, used = {}, 0
        for name, tensor in held.items():
            offsets[name] = used
            used += -(-tensor.numel() * tensor.element_size() // 256) * 256
        arenas[rank] = torch.full((used,), GUARD, dtype=torch.uint8)
        places[rank] = StagingPlace(export_memory(arenas[rank]), offsets)

    def write(rank: int, exchange: AmaxExchange) -> list[Written]:
        live: Any = SimpleNamespace(storages=lambda: source[rank])
        share = Share(live, rank, Manifest({}), plan, 20.0, exchange)
        told: list[Written] = []
        sent = Writer(share, places).send(1, told.append)
        assert sent.error is None
        assert len(told) == PARTS
        return told

    faults = []
    for rank, told in on_every_rank(plan, source, write).items():
        for to in destination:
            copies = [c for c in as_written(plan.to_rank(to)) if c.source_rank == rank]
            base, offsets = arenas[to].data_ptr(), places[to].offsets
            table = check_table(copies, lambda n, b=base, o=offsets: b + o[n], torch.device("cpu"))
            found = torch.zeros(len(copies), dtype=torch.int64)
            run_table(table, found, None)
            if found.numpy().tobytes() != b"".join(part[to] for part in told):
                faults.append(f"trainer rank {rank} to engine rank {to}")
    for rank, held in destination.items():
        for name, tensor in held.items():
            first, nbytes = places[rank].offsets[name], tensor.numel() * tensor.element_size()
            tensor.copy_(arenas[rank][first : first + nbytes].view(tensor.dtype))
    return faults


def with_misc(destination: Manifest, plan: Plan) -> Manifest:
    """The destination's manifest with the storages that the plan itself put on the misc path."""
    ranks: dict[int, list[Box]] = {}
    for rank, boxes in destination.ranks.items():
        ranks[rank] = []
        for box in boxes:
            moved = plan.tensors[box.tensor].misc and not box.at.storage.startswith(MISC)
            if not moved:
                ranks[rank].append(box)
            elif all(b.tensor != box.tensor for b in ranks[rank]):
                ranks[rank].append(_misc_box(box, plan))
    return type(destination).of(plan.tensors.values(), ranks)


def _misc_box(box: Box, plan: Plan) -> Box:
    shape = plan.tensors[box.tensor].shape
    blocks = block_shape(shape)
    scale_at = None
    if box.scale_at is not None and plan.tensors[box.tensor].encoding is Encoding.BLOCKWISE:
        scale_at = Placement(f"{MISC}{box.tensor}_scale_inv", 0, (blocks[1], 1))
    at = Placement(MISC + box.tensor, 0, (shape[1], 1))
    return type(box)(box.tensor, (0, 0), shape, at, scale_at)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def differing(found: Ranks, wanted: Ranks) -> list[str]:
    """Storages whose bytes differ, guard bytes between the boxes included."""
    return [
        f"rank {rank}: {name}"
        for rank, held in wanted.items()
        for name, tensor in held.items()
        if not torch.equal(bits(found[rank][name]), bits(tensor))
    ]


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
