"""NVIDIA's two public ways between meshes as peers of `refit.py`: NeMo-RL's golden transfer, and NCCL M2N.

Both move one tensor a call, and neither quantizes, so both are given FP8 pairs that rank 0 holds whole and
quantized beforehand. NeMo-RL stacks a layer's experts anew at each refit, which is left out here.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import refit_world
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate

from fp8sync.plan.boxes import touched_blocks
from fp8sync.wire.payload import view

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refit_peers import Stage

__all__ = ["Golden", "M2n"]

_AT_ONCE = 256
"""Tensors of a group of M2N."""


class Golden:
    """NeMo-RL's `xferdtensor`, golden: a broadcast of every tensor, of which workers keep what is theirs.

    Its file `nemo_rl/weight_sync/xferdtensor.py` is run by itself, as the package asks for Ray and more; `nemo_rl`
    has to be importable.
    """

    name = "NeMo-RL golden"
    only = ""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._module = refit_world.file_of("nemo_rl", "weight_sync/xferdtensor.py")
        os.environ["NRL_XFERDTENSOR_GOLDEN"] = "1"
        self.rank = stage.rank
        self._pairs = list(stage.pairs()) if stage.rank == 0 else []
        self._ours = SimpleNamespace(mesh=torch.tensor([0]))
        workers = torch.arange(stage.trainers, stage.trainers + len(stage.wanted.ranks))
        self._theirs = SimpleNamespace(mesh=workers)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """What NeMo-RL's code asks of its group."""
        dist.broadcast(tensor, src, self._stage.everyone)

    def run(self) -> None:
        """One transfer."""
        stage, ref = self._stage, self._module.DTensorRef
        if stage.rank == 0:
            for _, tensor in self._pairs:
                self._move(ref(tensor, tensor.shape), None)
        elif stage.staged:
            for name, (shape, dtype) in stage.shapes():
                full = torch.empty(shape, dtype=dtype, device=stage.device)
                self._move(None, ref(full, full.shape))
                stage.load([(name, full)])

    def _move(self, ours: Any, theirs: Any) -> None:
        whole = [Replicate()]
        self._module.xferdtensor(ours, self._ours, whole, theirs, self._theirs, whole, self)


class M2n:
    """`nccl.m2n.reshard` of nccl-extensions, from one rank to one worker, in groups of tensors.

    What arrives is written straight to where the engine wants it, so the worker copies nothing. All 37,491 tensors
    in one group had not come to an end in 40 s.
    """

    name = "NCCL M2N"
    only = "one to one"

    def __init__(self, stage: Stage) -> None:
        import nccl.core
        from nccl import m2n

        self._m2n = m2n
        first = stage.rank == 0
        self._tensors = list(stage.pairs()) if first else list(_places(stage))
        self._first = first
        said = bytearray(nccl.core.get_unique_id().as_bytes) if first else bytearray(128)
        token = torch.frombuffer(said, dtype=torch.uint8).to(stage.device)
        dist.broadcast(token, 0, stage.everyone)
        unique = nccl.core.UniqueId.from_bytes(token.cpu().numpy().tobytes())
        self._group = nccl.core.Communicator.init(2, stage.rank, unique)
        self._handle = m2n.init()

    def run(self) -> None:
        """One transfer."""
        stream = torch.cuda.current_stream()
        whole = [self._m2n.Replicate()]
        sides: dict[str, Any] = {"src_mesh": [0], "src_placements": whole, "handle": self._handle}
        sides |= {"dst_mesh": [1], "dst_placements": whole}
        for first in range(0, len(self._tensors), _AT_ONCE):
            with self._m2n.group():
                for _, tensor in self._tensors[first : first + _AT_ONCE]:
                    ends = (tensor, None) if self._first else (None, tensor)
                    self._m2n.reshard(*ends, self._group, stream, **sides)


def _places(stage: Stage) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield where an only worker wants each tensor of `Stage.pairs`."""
    for name in stage.wanted.tensors:
        (box,) = stage.boxes[name]
        yield name, view(stage.staged, box.at, box.shape)
        if box.scale_at is not None:
            _, shape = touched_blocks((box.start, box.shape))
            yield f"{name}_scale_inv", view(stage.staged, box.scale_at, shape)
