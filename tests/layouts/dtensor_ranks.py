"""What four real ranks do: shard, redistribute, list their boxes, and write all of it down.

Run as `python -m tests.layouts.dtensor_ranks RANK SIZE RENDEZVOUS_FILE FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from fp8sync.sources import as_source
from fp8sync.sources.dtensor import DTensorSource

R, S = Replicate(), Shard
MOVES = {
    "shard0-shard1": ((4,), [S(0)], [S(1)]),
    "shard1-replicate": ((4,), [S(1)], [R]),
    "replicate-shard0": ((4,), [R], [S(0)]),
    "shard2-shard0": ((4,), [S(2)], [S(0)]),
    "2d-rows-columns": ((2, 2), [S(0), S(1)], [S(1), S(0)]),
    "2d-twice0": ((2, 2), [S(0), S(0)], [R, S(1)]),
    "2d-hsdp": ((2, 2), [R, S(0)], [S(0), R]),
    "2d-replicas": ((2, 2), [S(1), R], [S(0), S(2)]),
}
SHAPES = ((10, 7, 3), (5, 4, 9), (1, 13, 2), (16, 8, 4))


class Holder(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


class Experts(nn.Module):
    """Stacked as in recent transformers."""

    def __init__(self, experts: int = 5, rows: int = 192, hidden: int = 320) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * rows, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, rows))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(320, 576, bias=True)
        self.down = nn.Linear(576, 320, bias=False)
        self.norm = nn.LayerNorm(7)
        self.mlp = nn.ModuleDict({"experts": Experts()})
        self.register_buffer("steps", torch.zeros(3))
        self.tied = nn.Linear(320, 576, bias=False)
        self.tied.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def block() -> Block:
    module = Block()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in module.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator))
    return module.to(torch.bfloat16)


def sharded(kind: str) -> nn.Module:
    module = block()
    if kind == "fsdp":
        fully_shard(module, mesh=init_device_mesh("cpu", (4,)))
    elif kind == "fsdp-after-forward":
        fully_shard(module, mesh=init_device_mesh("cpu", (4,)), reshard_after_forward=False)
        module(torch.zeros(2, 320, dtype=torch.bfloat16))
    elif kind == "hsdp":
        fully_shard(module, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        module.tied = None
        parallelize_module(module, mesh["tp"], plan)
        fully_shard(module, mesh=mesh["dp"])
    return module


MODULES = ("fsdp", "fsdp-after-forward", "hsdp", "fsdp-tp")


def ids(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int64).view(shape)


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, gaps included: boxes speak of the tensor as it lies."""
    storage = tensor.untyped_storage().clone()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def main(rank: int, size: int, rendezvous: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size)
    written: dict[str, torch.Tensor] = {}
    manifests = {}

    def write(key: str, source: DTensorSource) -> None:
        manifests[key] = source.manifest().to_json()
        for name, tensor in source.storages().items():
            written[f"{key}/{name}"] = copy_of(tensor)

    for key, (mesh_shape, before, after) in MOVES.items():
        mesh = init_device_mesh("cpu", mesh_shape)
        held = {f"t{n}": distribute_tensor(ids(s), mesh, before) for n, s in enumerate(SHAPES)}
        moved = {n: t.redistribute(mesh, after) for n, t in held.items()}
        write(f"{key}/before", DTensorSource(Holder(held), rank))
        write(f"{key}/after", DTensorSource(Holder(moved), rank))
    for kind in MODULES:
        module = sharded(kind)
        source = as_source(module)
        assert isinstance(source, DTensorSource)
        write(kind, source)
        _is_live(module, source)
    torch.save(written, folder / f"{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(manifests))
    dist.barrier()
    dist.destroy_process_group()


def _is_live(module: nn.Module, source: DTensorSource) -> None:
    """The storages are the parameters themselves: an optimizer's step is seen at once."""
    before = source.storages()
    with torch.no_grad():
        for parameter in module.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.add_(1)
    after = source.storages()
    assert all(torch.equal(before[n], after[n]) for n in after)
    assert all(before[n].data_ptr() == after[n].data_ptr() for n in after)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
