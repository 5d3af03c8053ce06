"""The two sides of `refit.py`: trainer ranks and engine workers with real weights and no model.

Everything between them is fp8sync's own: conductor, followers, control channel, plan, transports, staging
memory, digests and votes. Only what a vLLM would do with the staged bytes is left out.
"""

from __future__ import annotations

import importlib.util
import secrets
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.control import Channel, Listener
from fp8sync.engines.vllm.agreement import place, plan_with
from fp8sync.engines.vllm.intake import Intake
from fp8sync.engines.vllm.layout import StorageSpec
from fp8sync.engines.vllm.receive import open_receivers
from fp8sync.engines.vllm.staging import Staging
from fp8sync.errors import Fp8SyncError
from fp8sync.link.conductor import Conductor
from fp8sync.link.follower import Follower
from fp8sync.link.member import Member
from fp8sync.manifest import Manifest
from fp8sync.plan.boxes import touched_blocks
from fp8sync.recipe import Encoding, Recipe
from fp8sync.sources import LiveSource
from fp8sync.waiting import HostTime
from fp8sync.wire.payload import view
from fp8sync_kernels import quantize_blockwise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from fp8sync.manifest import Box, TensorInfo
    from fp8sync.wire.payload import Storages

TIMEOUT_S = 60.0
Tensors = dict[str, torch.Tensor]


def own(manifest: Manifest, rank: int) -> Manifest:
    """One rank's part of a manifest."""
    return Manifest.of(manifest.tensors.values(), {rank: manifest.ranks[rank]})


def specs(manifest: Manifest, rank: int) -> dict[str, StorageSpec]:
    """The storages of one rank, flat."""
    sizes: dict[str, int] = defaultdict(int)
    dtypes: dict[str, torch.dtype] = {}
    for box in manifest.ranks[rank]:
        placed = [(box.at, box.shape, getattr(torch, manifest.tensors[box.tensor].dtype))]
        if box.scale_at is not None:
            blocks = touched_blocks((box.start, box.shape))[1]
            placed.append((box.scale_at, blocks, torch.float32))
        for at, shape, dtype in placed:
            last = at.offset + sum((n - 1) * s for n, s in zip(shape, at.strides, strict=True))
            sizes[at.storage] = max(sizes[at.storage], last + 1)
            dtypes[at.storage] = dtype
    return {name: StorageSpec((n,), (1,), dtypes[name]) for name, n in sizes.items()}


def allocated(manifest: Manifest, rank: int, device: torch.device) -> Tensors:
    """The storages of one rank, zero."""
    found = specs(manifest, rank)
    return {n: torch.zeros(s.size, dtype=s.dtype, device=device) for n, s in found.items()}


def whole(info: TensorInfo, device: torch.device, version: int = 0) -> torch.Tensor:
    """A version of a full HF tensor in BF16, the same on every rank that asks; neighbouring blocks differ in scale."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{info.name} {version}".encode()))
    tensor = torch.empty(info.shape, dtype=torch.bfloat16, device=device)
    tensor.normal_(std=0.02, generator=generator)
    counts = [-(-n // 128) for n in info.shape]
    powers = torch.randint(-9, 5, counts, generator=generator, device=device).to(tensor.dtype)
    for dim, size in enumerate(info.shape):
        powers = powers.repeat_interleave(128, dim).narrow(dim, 0, size)
    return tensor.mul_(powers.exp2_())


def by_tensor(boxes: Sequence[Box]) -> Iterator[tuple[str, list[Box]]]:
    """Boxes of the same tensor together."""
    found: dict[str, list[Box]] = defaultdict(list)
    for box in boxes:
        found[box.tensor].append(box)
    yield from found.items()


def cut(tensor: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """A rectangle of a tensor."""
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def fill(manifest: Manifest, rank: int, storages: Tensors, version: int = 0) -> None:
    """Write a rank's part of a version of every tensor; blockwise ones are quantized whole by the reference."""
    device = next(iter(storages.values())).device
    for name, boxes in by_tensor(manifest.ranks[rank]):
        info = manifest.tensors[name]
        full, scales = whole(info, device, version), None
        if info.encoding is Encoding.BLOCKWISE and info.formula is not None:
            full, scales, _ = quantize_blockwise(full, info.formula.value)
        put(boxes, full, scales, storages)


def put(
    boxes: Sequence[Box], full: torch.Tensor, scales: torch.Tensor | None, storages: Tensors
) -> None:
    """Write a tensor's boxes from its full form."""
    for box in boxes:
        view(storages, box.at, box.shape).copy_(cut(full, box.start, box.shape))
        if box.scale_at is not None and scales is not None:
            start, shape = touched_blocks((box.start, box.shape))
            view(storages, box.scale_at, shape).copy_(cut(scales, start, shape))


def differing(found: Tensors, wanted: Tensors) -> int:
    """How many storages differ in any byte."""
    pairs = ((found[name].view(torch.uint8), t.view(torch.uint8)) for name, t in wanted.items())
    return sum(not torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True)
class PaperSource:
    """A trainer rank of a layout on paper."""

    described: Manifest
    held: Tensors

    def manifest(self) -> Manifest:
        """Return this rank's boxes."""
        return self.described

    def storages(self) -> Tensors:
        """Return the weights."""
        return self.held


def lead(
    source: PaperSource, store: Any, key: str, transport: str, counts: tuple[int, int], size: int
) -> Conductor:
    """Trainer rank 0: make the link. `counts` are the ranks of trainer and engine."""
    token = secrets.token_hex(16)
    listener = Listener(token, timeout_s=TIMEOUT_S)
    store.set(key, f"{listener.port} {token}")
    member = Member(LiveSource(lambda: source), 0)
    recipe = Recipe("blockwise-pow2")
    trainers, workers = counts
    conductor = Conductor(
        member, recipe, trainers, (workers,), size, TIMEOUT_S, transport, "staged"
    )
    member.source.prepare()
    conductor.agree(listener)
    listener.close()
    return conductor


def ready(store: Any, key: str, version: int, member: int) -> None:
    """Say that a member's GPU has done all that comes before a version."""
    torch.cuda.synchronize()
    store.set(f"{key} {version} {member}", "")


def await_ready(store: Any, key: str, version: int, members: Iterable[int]) -> None:
    """Wait until members are ready for a version: by `ipc` it may reach their memory as soon as it begins."""
    names = [f"{key} {version} {member}" for member in members]
    store.wait(names, timedelta(seconds=TIMEOUT_S))


def timed_refit(
    conductor: Conductor, version: int, stages: list[dict[str, float]] | None = None
) -> float:
    """Seconds from the announcement until every worker has voted, all bytes verified in staging.

    What the conductor says of the stages is appended to `stages`, with `host`: seconds of these in which it
    waited for nobody.
    """
    began, host = time.perf_counter(), HostTime()
    conductor.open(version)
    conductor.send(version)
    seconds, own = time.perf_counter() - began, host.seconds
    outcome = conductor.commit()
    conductor.conclude()
    if stages is not None:
        stages.append({**outcome.seconds, "host": own})
    return seconds


def file_of(package: str, place: str) -> Any:
    """Return a file of an installed package as a module, without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named '{package}'")
    path = Path(found.origin).parent / place
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _reach(store: Any, key: str) -> Channel:
    port, token = store.get(key).decode().split()
    return Channel.connect("127.0.0.1", int(port), token, TIMEOUT_S)


def follow(source: PaperSource, rank: int, store: Any, key: str) -> Follower:
    """Any other trainer rank."""
    channel = _reach(store, key)
    member = Member(LiveSource(lambda: source), rank, channel.progress, channel.hung_up)
    follower = Follower(channel, member)
    follower.agree()
    return follower


class Worker:
    """An engine worker: staging memory and a way in, but no model.

    Args:
        wanted: this worker's boxes.
        rank: this worker among the engine's.
        device: its GPU.
    """

    stood_s = 0.0  # no model runs meanwhile

    def __init__(self, wanted: Manifest, rank: int, device: torch.device) -> None:
        self._wanted, self._rank, self._device = wanted, rank, device
        self._staging = Staging(device, 0)
        self._staging.lay_out([specs(wanted, rank)])
        self.clear()

    @property
    def staged(self) -> Tensors:
        """What has arrived."""
        return self._staging.views()

    def clear(self) -> None:
        """Fill staging memory with zeros."""
        for tensor in self.staged.values():
            tensor.zero_()

    def join(self, store: Any, key: str) -> None:
        """Join the link as `WorkerSession` does."""
        self._channel = channel = self._arrive(store, key)
        source = Manifest.from_json(channel.receive("source")["manifest"])
        where = self._rank, self._device
        plan, _ = plan_with(channel, source, self._wanted, *where)
        staging = self._staging
        channel.send(place(self._device, [], staging.export(), staging.offsets))
        intake = Intake(channel, staging, source, self._wanted, plan, *where)
        choice = channel.receive("transport")
        self._forwards = bool(choice["forward_bytes"])
        (self._receiver,) = open_receivers(choice, [intake])
        channel.send({"type": "ready", "direct": 0, "process": 0, "unproven": {}})

    def _arrive(self, store: Any, key: str) -> Channel:
        channel = _reach(store, key)
        found = {"updating": False, "mixed": False, "stopped": "", "renews": False}
        channel.send({"type": "join", "role": "engine", "rank": self._rank, **found})
        return channel

    def take(self) -> None:
        """One version, to the vote and through the commit."""
        channel = self._channel
        version = int(channel.receive("version")["version"])
        self._vote(self._receiver.receive, version)
        if self._forwards and channel.receive("forward")["go"]:
            self._vote(self._receiver.forward, version)
        channel.receive("prepare")
        channel.send({"type": "vote", "error": None})
        channel.receive("decision")
        self._committed()

    def _committed(self) -> None:
        said = {"commit_s": 0.0, "stood_s": self.stood_s, "failure": ""}
        self._channel.send({"type": "committed", **said})

    def _vote(self, step: Callable[[int, Storages], None], version: int) -> None:
        error: dict[str, Any] | None = None
        try:
            step(version, self.staged)
        except Fp8SyncError as caught:
            error = caught.to_wire()
        self._channel.send({"type": "vote", "error": error})

    def leave(self) -> None:
        """Leave the link; staging memory stays."""
        self._receiver.close()
        self._channel.close()
