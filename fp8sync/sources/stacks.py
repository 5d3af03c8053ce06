"""HF tensors inside a parameter: the expert stacks of recent transformers, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fp8sync.plan.boxes import Rect

__all__ = ["HfPart", "hf_parts"]

_STACK = re.compile(r"(?P<experts>.*\.experts)\.(?P<kind>gate_up_proj|up_proj|down_proj)$")


@dataclass(frozen=True, slots=True)
class HfPart:
    """An HF tensor inside a parameter.

    Args:
        name: HF name.
        rect: the rectangle of the parameter that it fills.
        dims: the parameter's dims that are the HF tensor's, in order; in the others it has one element.
    """

    name: str
    rect: Rect
    dims: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The HF tensor's shape."""
        return tuple(self.rect[1][d] for d in self.dims)


def hf_parts(name: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[HfPart]:
    """Yield the HF tensors of a parameter: itself, or the experts of a stack, as checkpoints name them.

    Stacks `experts.gate_up_proj` [E, 2I, H] with `experts.down_proj` [E, H, I] are taken apart, and so is
    `experts.up_proj` [E, I, H] of experts without a gate (Nemotron-H). Where the model keeps both
    transposed, [E, H, 2I] and [E, I, H] (GPT-OSS, Llama 4), checkpoints hold the stack itself, and so does
    the list.

    Args:
        name: of the parameter.
        shapes: of all parameters, by name; a stack's sibling tells how it lies.

    Raises:
        ValueError: a stack that lies in neither way.
    """
    shape = tuple(shapes[name])
    stack = _STACK.match(name)
    if stack is None or len(shape) != 3 or _is_transposed(stack["experts"], shapes):
        yield HfPart(name, ((0,) * len(shape), shape), tuple(range(len(shape))))
        return
    experts, rows, cols = shape
    kinds = ["gate_proj", "up_proj"] if stack["kind"] == "gate_up_proj" else [stack["kind"]]
    rows //= len(kinds)
    for expert in range(experts):
        for half, kind in enumerate(kinds):
            rect = (expert, half * rows, 0), (1, rows, cols)
            yield HfPart(f"{stack['experts']}.{expert}.{kind}.weight", rect, (1, 2))


def _is_transposed(experts: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Tell from both stacks' shapes; they cannot fit both ways."""
    gate_up, up, down = (
        tuple(shapes.get(f"{experts}.{kind}", ()))
        for kind in ("gate_up_proj", "up_proj", "down_proj")
    )
    if not gate_up and len(up) == len(down) == 3 and up == (down[0], down[2], down[1]):
        return False  # which is how the one such model of transformers lies; shapes cannot tell
    if len(gate_up) == len(down) == 3 and gate_up[0] == down[0]:
        if gate_up[1:] == (2 * down[2], down[1]):
            return False
        if gate_up[1:] == (down[2], 2 * down[1]):
            return True
    raise ValueError(
        "expected gate_up_proj [E, 2I, H] with down_proj [E, H, I], or both transposed, "
        f"found {list(gate_up)} and {list(down)}"
    )
