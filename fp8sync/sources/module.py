"""A plain torch module with Hugging Face names: whole tensors on one rank."""

from __future__ import annotations

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import ITEMSIZE, Box, Manifest, Placement, TensorInfo
from fp8sync.sources.stacks import hf_parts

__all__ = ["ModuleSource"]


class ModuleSource:
    """A Hugging Face (or any) module whose parameters are plain dense tensors.

    Parameters and persistent buffers are listed under their `state_dict` names. Tied parameters are
    listed once, under their first name. Expert stacks of recent transformers (`experts.gate_up_proj`
    [E, 2I, H], `experts.down_proj` [E, H, I]) are listed per expert, transposed ones (GPT-OSS) whole,
    both as checkpoints name them.

    Args:
        module: the model.
        rank: this trainer rank; where every rank has a whole copy, they share the sending.

    Examples:
        >>> source = ModuleSource(torch.nn.Linear(3, 2, bias=False))
        >>> source.manifest().tensors["weight"].shape
        (2, 3)
    """

    def __init__(self, module: torch.nn.Module, rank: int = 0) -> None:
        self._module, self._rank = module, rank

    def storages(self) -> dict[str, torch.Tensor]:
        """Return the live parameters and buffers by name; nothing is copied."""
        return {name: value.detach() for name, value in self._values().items()}

    def manifest(self) -> Manifest:
        """Return one box per HF tensor.

        Raises:
            UnsupportedLayout: a parameter that is distributed, quantized or of an unknown dtype, or a
                stack of experts that lies in an unknown way; all of them at once.
        """
        values = self._values()
        shapes = {name: tensor.shape for name, tensor in values.items()}
        infos: list[TensorInfo] = []
        boxes: list[Box] = []
        faults: list[str] = []
        for storage, tensor in values.items():
            try:
                _check_plain(tensor)
                parts = list(hf_parts(storage, shapes))
            except ValueError as error:
                faults.append(f"{storage}: {error}")
                continue
            for part in parts:
                infos.append(TensorInfo(part.name, part.shape, _dtype(tensor)))
                first = sum(i * s for i, s in zip(part.rect[0], tensor.stride(), strict=True))
                at = Placement(storage, first, tuple(tensor.stride(d) for d in part.dims))
                boxes.append(Box(part.name, (0,) * len(part.shape), part.shape, at))
        if faults:
            raise UnsupportedLayout("not a plain module", faults)
        return Manifest.of(infos, {self._rank: boxes})

    def _values(self) -> dict[str, torch.Tensor]:
        """What the module holds, not detached: detached, a subclass of Parameter looks plain."""
        seen: set[tuple[object, ...]] = set()
        found: dict[str, torch.Tensor] = {}
        for name, value in self._module.state_dict(keep_vars=True).items():
            if not isinstance(value, torch.Tensor):
                continue
            # Two views of one memory are tied only if they show it alike; meta tensors have none.
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if value.numel() and not value.is_meta and key in seen:
                continue
            seen.add(key)
            found[name] = value
        return found


def _check_plain(tensor: torch.Tensor) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise ValueError(f"expected a plain tensor, found {type(tensor).__name__}")
    if tensor.is_meta:
        raise ValueError("expected data, found a meta tensor")
    if _dtype(tensor) not in ITEMSIZE:
        raise ValueError(f"dtype {_dtype(tensor)} cannot travel")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
