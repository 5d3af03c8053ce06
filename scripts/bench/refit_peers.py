"""Other ways to fill the same staging memory on the same GPUs, in favour of the peer where in doubt.

Each peer is its own public code where it has any. What is left out of a peer's time: gathering and
quantizing where its own transfer does not include them (`packed`), and everything an engine's loader
does beyond copying a worker's boxes out of each full tensor.
"""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import refit_nvidia
import refit_world
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fp8sync.plan.boxes import touched_blocks
from fp8sync.recipe import Encoding
from fp8sync.wire.payload import view
from fp8sync_kernels import quantize_blockwise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8sync.manifest import Box, Manifest

__all__ = ["PEERS", "Stage", "timed"]


class Stage:
    """One rank's part in a peer's run.

    Args:
        rank: of all ranks; the trainer's come first.
        trainers: ranks of the trainer.
        source, wanted: boxes of both sides.
        held: this trainer rank's weights, or nothing.
        staged: this worker's staging memory, or nothing.
        device: this rank's GPU.
        everyone, trainer: groups of rank 0 with all workers, and of the trainer's ranks.
    """

    def __init__(
        self,
        rank: int,
        trainers: int,
        sides: tuple[Manifest, Manifest],
        held: refit_world.Tensors,
        staged: refit_world.Tensors,
        device: torch.device,
        groups: tuple[Any, Any],
    ) -> None:
        self.rank, self.trainers, self.device = rank, trainers, device
        self.source, self.wanted = sides
        self.held, self.staged = held, staged
        self.everyone, self.trainer = groups
        self.boxes: dict[str, list[Box]] = defaultdict(list)
        if staged:
            for box in self.wanted.ranks[rank - trainers]:
                self.boxes[box.tensor].append(box)

    def pairs(self, first: int = 0, step: int = 1) -> Iterator[tuple[str, torch.Tensor]]:
        """Every `step`-th tensor as the engine's checkpoint would have it, codes before their scales."""
        for name, info in islice(self.wanted.tensors.items(), first, None, step):
            full = refit_world.whole(info, self.device)
            if info.encoding is Encoding.BLOCKWISE and info.formula is not None:
                q = quantize_blockwise(full, info.formula.value)
                yield name, q.weight
                yield f"{name}_scale_inv", q.scale_inv
            else:
                yield name, full

    def shapes(self) -> Iterator[tuple[str, tuple[list[int], torch.dtype]]]:
        """The metadata of `pairs`."""
        for name, info in self.wanted.tensors.items():
            blockwise = info.encoding is Encoding.BLOCKWISE
            dtype = torch.float8_e4m3fn if blockwise else torch.bfloat16
            yield name, (list(info.shape), dtype)
            if blockwise:
                yield f"{name}_scale_inv", ([-(-n // 128) for n in info.shape], torch.float32)

    def load(self, items: list[tuple[str, torch.Tensor]]) -> None:
        """Copy this worker's boxes out of full tensors, as an engine's loader would at least."""
        for name, full in items:
            tensor = name.removesuffix("_scale_inv")
            for box in self.boxes[tensor]:
                if tensor == name:
                    target = view(self.staged, box.at, box.shape)
                    target.copy_(refit_world.cut(full, box.start, box.shape))
                elif box.scale_at is not None:
                    start, shape = touched_blocks((box.start, box.shape))
                    target = view(self.staged, box.scale_at, shape)
                    target.copy_(refit_world.cut(full, start, shape))


class Packed:
    """vLLM's packed NCCL broadcast, of FP8 pairs that rank 0 holds whole and quantized beforehand."""

    name = "vLLM packed"
    only = ""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._module = refit_world.file_of("vllm", "distributed/weight_transfer/packed_tensor.py")
        self._pairs = list(stage.pairs()) if stage.rank == 0 else []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """What vLLM's code asks of its group."""
        dist.broadcast(tensor, src, self._stage.everyone)

    def run(self) -> None:
        """One transfer."""
        stage = self._stage
        if stage.rank == 0:
            send = self._module.packed_nccl_broadcast_producer
            send(iter(self._pairs), self, 0, lambda item: item[1])
        elif stage.staged:
            take = self._module.packed_nccl_broadcast_consumer
            take(stage.shapes(), self, 0, stage.load, device=stage.device)


class FullTensor:
    """torch: `full_tensor()` of every FSDP parameter, a broadcast in BF16, quantized by the worker."""

    name = "full_tensor()"
    only = "FSDP"

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._sharded: dict[str, DTensor] = {}
        if not stage.held:
            return
        mesh = DeviceMesh.from_group(stage.trainer, "cuda")
        for box in stage.source.ranks[stage.rank]:
            shape = torch.Size(stage.source.tensors[box.tensor].shape)
            own = view(stage.held, box.at, box.shape)
            stride = torch.empty(shape, device="meta").stride()
            self._sharded[box.tensor] = DTensor.from_local(
                own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
            )

    def run(self) -> None:
        """One transfer."""
        stage = self._stage
        for name, info in stage.wanted.tensors.items():
            if stage.held:
                full = self._sharded[name].full_tensor()
            elif stage.staged:
                full = torch.empty(info.shape, dtype=torch.bfloat16, device=stage.device)
            if stage.rank == 0 or stage.staged:
                dist.broadcast(full, 0, stage.everyone)
            if not stage.staged:
                continue
            if info.encoding is Encoding.BLOCKWISE and info.formula is not None:
                q = quantize_blockwise(full, info.formula.value)
                stage.load([(name, q.weight), (f"{name}_scale_inv", q.scale_inv)])
            else:
                stage.load([(name, full)])


PEERS: dict[str, Any] = {
    "packed": Packed,
    "full_tensor": FullTensor,
    "golden": refit_nvidia.Golden,
    "m2n": refit_nvidia.M2n,
}
"""Each is made of a `Stage`, has a `name`, a `run` that makes one transfer, and `only` for which mappings it is."""


def timed(peer: Any, repeats: int) -> list[float]:
    """Seconds of each run on all ranks together."""
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        peer.run()
        torch.cuda.synchronize()
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return seconds
