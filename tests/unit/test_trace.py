"""What is read off a loader's operations: a toy's, without vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8sync.engines.vllm.trace import Trace, trace_load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Toy(torch.nn.Module):
    """Two parameters of 4 x 4; each tensor is loaded by a function."""

    def __init__(self, load: Callable[[Toy, str, torch.Tensor], None]) -> None:
        super().__init__()
        self.load = load
        self.p, self.q = (torch.empty(4, 4, device="meta") for _ in range(2))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.load(self, name, tensor)


def traced(load: Callable[[Toy, str, torch.Tensor], None], names: str) -> Trace:
    toy = Toy(load)
    standins = {name: torch.empty(2, 4, device="meta") for name in names}
    return trace_load(toy, standins, {"p": toy.p, "q": toy.q})


def test_what_lies_beside_a_computed_tensor_is_no_box_either() -> None:
    def load(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        if name == "a":  # twice
            toy.p[:2].copy_(tensor)
            toy.q[:2].copy_(tensor)
        elif name == "b":
            toy.p[2:].copy_(tensor)
        else:
            toy.q[2:].copy_(-tensor)

    found = traced(load, "abc")
    assert set(found.writes) == {"b"}
    assert found.transformed == {"q": {"a", "c"}}
    assert set(found.transforms) == {"a", "c"}


def test_a_fill_is_a_constant_unless_it_overwrites_what_was_loaded() -> None:
    def padded(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        target = toy.p if name == "a" else toy.q
        target[:2].copy_(tensor)
        target[2:3].fill_(2.0)
        target[3:].zero_()
        if name == "b":
            target[1:3].zero_()

    found = traced(padded, "ab")
    assert set(found.writes) == {"a"}
    assert found.constants["p"] == [(((2, 0), (1, 4)), 2.0), (((3, 0), (1, 4)), 0.0)]
    assert found.transforms == {"b": "the loader overwrites what it loaded"}


def test_views_of_views_and_of_computed_tensors() -> None:
    def load(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        if name == "a":
            (first, second) = tensor.unsqueeze(0).transpose(1, 2).unbind()[0].split(2)
            toy.p[:2, :2].copy_(first.t())
            toy.p[:2, 2:].copy_(second.t())
        else:
            toy.q[:2].copy_((tensor + 1).narrow(0, 0, 2).view(2, 4))

    found = traced(load, "ab")
    assert [(w.source, w.target) for w in found.writes["a"]] == [
        (((0, 0), (2, 2)), ((0, 0), (2, 2))),
        (((0, 2), (2, 2)), ((0, 2), (2, 2))),
    ]
    assert found.transforms == {"b": "the loader computes what it stores"}
