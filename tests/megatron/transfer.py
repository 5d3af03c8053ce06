"""Moves what the boxes say to rank 0, through the real plan, senders, gloo group and receivers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fp8sync.engines.vllm.buckets import BucketReceiver
from fp8sync.engines.vllm.intake import Intake
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import MISC, build_plan
from fp8sync.plan.boxes import block_shape
from fp8sync.recipe import BLOCK, Encoding, Formula
from fp8sync.sending.exchange import open_exchange
from fp8sync.sending.sender import Sender
from fp8sync.sending.share import Share
from fp8sync.transport import Invitation
from fp8sync.wire.payload import view

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8sync.plan import Plan
    from fp8sync.transport import Choice
    from fp8sync.wire.payload import Storages

SCALES = ".scale_inv"
WAIT_S = 60.0
CPU = torch.device("cpu")
_held: list[Invitation] = []


def destination(source: Manifest, formulas: Mapping[str, Formula]) -> Manifest:
    """One rank that wants whole tensors: blockwise where `formulas` names one, else as they are."""
    infos, boxes = [], []
    for name, info in source.tensors.items():
        zero, at = (0,) * len(info.shape), _whole(name, info.shape)
        formula = formulas.get(name)
        if formula is None:
            infos.append(TensorInfo(name, info.shape, info.dtype))
            boxes.append(Box(name, zero, info.shape, at))
            continue
        scale_at = _whole(name + SCALES, block_shape(info.shape))
        kind = "float8_e4m3fn", Encoding.BLOCKWISE, formula
        infos.append(TensorInfo(name, info.shape, *kind))
        boxes.append(Box(name, zero, info.shape, at, scale_at))
    return Manifest.of(infos, {0: boxes})


def transfer(source: Manifest, wanted: Manifest, live: Storages) -> dict[str, torch.Tensor]:
    """Carry out the plan over gloo; rank 0 returns what arrived, the others nothing."""
    plan = build_plan(source, wanted)
    staging = {}
    if dist.get_rank() == 0:
        misc = [i for i in plan.tensors.values() if i.misc]
        staging = _staging(wanted)
        staging |= {MISC + i.name: torch.zeros(i.shape, dtype=_dtype(i)) for i in misc}
    carry_out(invite([0]), plan, source, live, {0: staging})
    return staging


def invite(workers: Sequence[int]) -> dict[tuple[str, int], Choice]:
    """Let rank 0 invite all trainer ranks and the workers, which are threads of its own, to a gloo group."""
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        members = [("trainer", rank) for rank in range(dist.get_world_size())]
        members += [("engine", rank) for rank in workers]
        peers = {member: f"{member[0]} rank {member[1]}" for member in members[1:]}
        sizes = {"bucket_bytes": 1 << 20, "forward_bytes": 0}
        way = Invitation("gloo", "127.0.0.1", WAIT_S, peers, {}, sizes, "gloo")
        _held.append(way)  # its store is where they meet
        told = [{member: way.to(*member) for member in members}]
    dist.broadcast_object_list(told)
    return told[0]


def carry_out(
    invited: dict[tuple[str, int], Choice],
    plan: Plan,
    held: Manifest,
    live: Storages,
    staged: Mapping[int, Storages],
) -> None:
    """Send and receive a version as a refit by `gloo` does.

    Args:
        invited: what every member was told.
        plan: what to bring where.
        held: the boxes of all trainer ranks.
        live: this trainer rank's weights.
        staged: staging memory of each worker.
    """
    rank = dist.get_rank()
    source: Any = SimpleNamespace(storages=lambda: live)
    channel: Any = SimpleNamespace(timeout_s=WAIT_S)
    exchange = open_exchange((), rank, CPU, lambda _: None)
    share = Share(source, rank, held, plan, WAIT_S, exchange)

    def take(worker: int) -> None:
        intake = Intake(channel, None, held, held, plan, worker, CPU)  # type: ignore[arg-type]
        (receiver,) = BucketReceiver.open(invited["engine", worker], [intake])
        receiver.receive(1, staged[worker])

    with ThreadPoolExecutor(len(staged)) as pool:
        taking = [pool.submit(take, worker) for worker in staged] if rank == 0 else []
        (sender,) = Sender.open(invited["trainer", rank], [share])
        sent = sender.send(1, lambda _: None)
        for worker in taking:
            worker.result(WAIT_S)
    if sent.error is not None:
        raise sent.error


def assemble(source: Manifest, live: Storages) -> dict[str, torch.Tensor]:
    """Read every box of every rank through its placements; rank 0 returns the whole tensors."""
    rank = dist.get_rank()
    own = []
    for box in source.ranks[rank]:
        scales = None
        if box.scale_at is not None:
            scales = _bytes(view(live, box.scale_at, block_shape(box.shape)))
        own.append((box, _bytes(view(live, box.at, box.shape)), scales))
    found: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(own, found if rank == 0 else None)
    made: dict[str, torch.Tensor] = {}
    seen: dict[Any, Any] = {}
    for box, elements, scales in (row for rows in found if rows for row in rows):
        replica = seen.setdefault((box.tensor, box.start, box.shape), (elements, scales))
        assert replica == (elements, scales), f"{box.tensor}: replicas differ"
        info = source.tensors[box.tensor]
        _put(made, box.tensor, info.shape, box.start, _tensor(elements, info.dtype, box.shape))
        if scales is not None:
            start = tuple(i // BLOCK for i in box.start)
            part = _tensor(scales, "float32", block_shape(box.shape))
            _put(made, box.tensor + SCALES, block_shape(info.shape), start, part)
    return made


def _put(made: dict, name: str, shape: Any, start: Any, part: torch.Tensor) -> None:
    whole = made.setdefault(name, torch.zeros(shape, dtype=part.dtype))
    whole[tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))] = part


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return flat.view(getattr(torch, dtype)).view(shape)


def _whole(storage: str, shape: tuple[int, ...]) -> Placement:
    return Placement(storage, 0, torch.empty(shape, device="meta").stride())


def _dtype(info: TensorInfo) -> torch.dtype:
    return getattr(torch, info.dtype)


def _staging(wanted: Manifest) -> dict[str, torch.Tensor]:
    made = {}
    for name, info in wanted.tensors.items():
        made[name] = torch.zeros(info.shape, dtype=_dtype(info))
        if info.encoding is Encoding.BLOCKWISE:
            made[name + SCALES] = torch.zeros(block_shape(info.shape))
    return made
