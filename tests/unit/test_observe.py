"""Tracing a loader once, with a look at each kind of tensor before: toy models, no vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fp8sync.engines.vllm.observe import observe
from fp8sync.errors import TensorMismatch
from fp8sync.manifest import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterable

SHAPE = (256, 128)
FP8 = torch.float8_e4m3fn


class Toy(torch.nn.Module):
    """Keeps each tensor in a parameter of its own; counts how often it is loaded."""

    def __init__(self, dtypes: dict[str, torch.dtype]) -> None:
        super().__init__()
        self.places: dict[str, torch.Tensor] = {}
        self.passes = 0
        with torch.device("meta"):
            for name, dtype in dtypes.items():
                self.places[name] = torch.empty(SHAPE, dtype=dtype)
                if dtype is FP8:
                    self.places[name + "_scale_inv"] = torch.empty(2, 1)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.passes += 1
        for name, tensor in weights:
            self.places[name].copy_(tensor)

    def held(self) -> dict[str, TensorInfo]:
        names = [name for name in self.places if not name.endswith("_scale_inv")]
        return {name: TensorInfo(name, SHAPE, "bfloat16") for name in names}


def test_one_pass_for_what_is_alike() -> None:
    dtypes = {f"layers.{n}.experts.{e}.weight": FP8 for n in range(2) for e in range(3)}
    toy = Toy({"embed.weight": torch.bfloat16, **dtypes})
    trace, paired = observe(toy, toy.held(), toy.places, 0)
    assert toy.passes == 2
    assert paired == list(dtypes)
    assert set(trace.writes) == set(toy.places)
    assert not trace.failures


@pytest.mark.parametrize("odd", ["layers.1.experts.0.weight", "layers.1.experts.2.weight"])
@pytest.mark.parametrize("usual", [FP8, torch.bfloat16])
def test_an_expert_unlike_the_others_is_found(odd: str, usual: torch.dtype) -> None:
    dtypes = {f"layers.{n}.experts.{e}.weight": usual for n in range(2) for e in range(3)}
    dtypes |= {odd: torch.bfloat16 if usual is FP8 else FP8, "head.weight": FP8}
    toy = Toy(dtypes)
    trace, paired = observe(toy, toy.held(), toy.places, 0)
    assert paired == [name for name, dtype in dtypes.items() if dtype is FP8]
    assert set(trace.writes) == set(toy.places)
    assert not trace.failures


def test_refused_tensors_are_named_with_the_rank() -> None:
    toy = Toy({"a.weight": FP8, "b.weight": torch.bfloat16})
    held = toy.held() | {"c.weight": TensorInfo("c.weight", SHAPE, "bfloat16")}
    with pytest.raises(TensorMismatch) as failure:
        observe(toy, held, toy.places, 3)
    (line,) = failure.value.violations
    assert line == (
        "c.weight (engine rank 3): sent with shape (256, 128); expected that the loader takes it, "
        "found that the loader refuses it: the loader raises KeyError 'c.weight'"
    )


def test_a_refused_scale_is_named_with_its_own_shape() -> None:
    toy = Toy({"a.weight": FP8})
    held = toy.held()
    del toy.places["a.weight_scale_inv"]
    with pytest.raises(TensorMismatch) as failure:
        observe(toy, held, {"a.weight": toy.places["a.weight"]}, 0)
    (line,) = failure.value.violations
    assert line.startswith("a.weight_scale_inv (engine rank 0): sent with shape (2, 1);")
