"""A small model whose experts lie one by one, and what torch says of its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4)
        self.down = nn.Linear(4, 3, bias=False)
        self.register_buffer("steps", torch.rand(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        self.scale = nn.Parameter(torch.rand(()))
        self.head = nn.Linear(3, 5, bias=False)


def told(module: nn.Module) -> dict[str, torch.Tensor]:
    """What torch itself says, which is the oracle here."""
    return dict(module.state_dict())


def as_it_lies(tensor: torch.Tensor) -> tuple[object, ...]:
    shape = tensor.shape, tensor.stride(), tensor.dtype
    return tensor.data_ptr(), *shape, tensor.detach().float().flatten().tolist()


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert {n: as_it_lies(t) for n, t in found.items()} == {
        n: as_it_lies(t) for n, t in wanted.items()
    }


def random(like: torch.Tensor) -> torch.Tensor:
    return torch.rand_like(like.detach())


def one(module: Model) -> nn.Linear:
    return module.experts[1].up


def trained(m: Model) -> None:
    with torch.no_grad():
        one(m).weight.add_(1)
