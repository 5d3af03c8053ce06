"""What the engine's loader does with the trainer's tensors: as they are, or as pairs where it keeps FP8."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from fp8sync.engines.vllm.trace import Trace, trace_load
from fp8sync.errors import TensorMismatch
from fp8sync.plan.boxes import block_shape

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from fp8sync.manifest import TensorInfo

__all__ = ["observe"]

_LATER_NUMBERS = re.compile(r"(?<=\d)(\D+)\d+")


def observe(
    model: torch.nn.Module,
    held: Mapping[str, TensorInfo],
    targets: Mapping[str, torch.Tensor],
    rank: int,
) -> tuple[Trace, list[str]]:
    """Trace the loader once, and before that on one tensor of each kind, to learn where FP8 is kept.

    A kind is a layer's: its experts are taken for alike. Where the trace itself shows another thing, all
    tensors are traced once more, as they are.

    Args:
        model: in load form.
        held: the trainer's tensors, in the order to load them.
        targets: the model's parameters and buffers by name.
        rank: this worker's, for messages.

    Returns:
        The trace, and the names of tensors that were given as pairs of FP8 codes and scale_inv.

    Raises:
        TensorMismatch: the loader refuses a tensor.
    """
    paired: list[str] = []
    if any(target.dtype == torch.float8_e4m3fn for target in targets.values()):
        first = {_kind(name): name for name in reversed(list(held))}
        tried = trace_load(model, _standins(held, first.values(), ()), targets)
        kinds = {_kind(name) for name in _in_fp8(tried, first.values(), targets)}
        paired = [name for name in held if _kind(name) in kinds]
    trace = trace_load(model, _standins(held, held, set(paired)), targets)
    found = _in_fp8(trace, held, targets)
    if found != paired:
        plain = trace_load(model, _standins(held, held, ()), targets)
        paired = _in_fp8(plain, held, targets)
        trace = trace_load(model, _standins(held, held, set(paired)), targets)
    _check_failures(trace, held, rank)
    return trace, paired


def _kind(name: str) -> str:
    """Return the name without any number but the first, which is the layer's."""
    return _LATER_NUMBERS.sub(r"\1", name)


def _standins(
    held: Mapping[str, TensorInfo], names: Iterable[str], paired: Collection[str]
) -> dict[str, torch.Tensor]:
    made = {}
    for name in names:
        shape = held[name].shape
        if name in paired:
            made[name] = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
            made[name + "_scale_inv"] = torch.empty(
                block_shape(shape), dtype=torch.float32, device="meta"
            )
        else:
            dtype = getattr(torch, held[name].dtype)
            made[name] = torch.empty(shape, dtype=dtype, device="meta")
    return made


def _in_fp8(trace: Trace, names: Iterable[str], targets: Mapping[str, torch.Tensor]) -> list[str]:
    """Return which of the names are written to FP8 parameters."""
    reached = trace.reached()
    fp8 = {storage for storage, t in targets.items() if t.dtype == torch.float8_e4m3fn}
    return [name for name in names if not fp8.isdisjoint(reached[name])]


def _check_failures(trace: Trace, held: Mapping[str, TensorInfo], rank: int) -> None:
    """A tensor whose values the loader looks at goes by misc; other refusals are final."""
    faults = []
    for name, reason in trace.failures.items():
        tensor = name if name in held else name.removesuffix("_scale_inv")
        if "meta" in reason or "DataDependent" in reason:
            trace.transforms[tensor] = f"the loader looks at the data ({reason})"
        else:
            shape = held[tensor].shape
            sent = shape if name == tensor else block_shape(shape)
            faults.append(
                f"{name} (engine rank {rank}): sent with shape {sent}; expected that the loader takes "
                f"it, found that the loader refuses it: {reason}"
            )
    if faults:
        raise TensorMismatch("the engine's loader refuses these tensors", faults)
