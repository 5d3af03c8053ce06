"""A plain torch module with Hugging Face names: whole tensors on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import ITEMSIZE, Box, Manifest, Placement, TensorInfo
from fp8sync.sources.places import ModuleState
from fp8sync.sources.stacks import hf_parts

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        self._state, self._rank = ModuleState(module, _shown), rank

    def storages(self) -> Mapping[str, torch.Tensor]:
        """Return the live parameters and buffers by name, not detached; nothing is copied.

        Raises:
            TensorMismatch: parameters that were tied in the last manifest are not any more.
        """
        return self._state.read()

    def manifest(self) -> Manifest:
        """Return one box per HF tensor.

        Raises:
            UnsupportedLayout: a parameter that is distributed, quantized or of an unknown dtype, or a
                stack of experts that lies in an unknown way; all of them at once.
        """
        values = self._state.walk()
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


def _shown(value: torch.Tensor) -> object:
    """What tied tensors have in common: two views of one memory are tied only if they show it alike."""
    if value.is_meta or not value.numel() or not value.data_ptr():  # freed
        return id(value)
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def _check_plain(tensor: torch.Tensor) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise ValueError(f"expected a plain tensor, found {type(tensor).__name__}")
    if tensor.is_meta:
        raise ValueError("expected data, found a meta tensor")
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise ValueError("expected data, found freed memory")
    if _dtype(tensor) not in ITEMSIZE:
        raise ValueError(f"dtype {_dtype(tensor)} cannot travel")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
