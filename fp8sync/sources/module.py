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
    [E, 2I, H], `experts.down_proj` [E, H, I]) are listed per expert, as checkpoints name them.

    Args:
        module: the model.
        rank: this trainer rank; where every rank has a whole copy, they share the sending.
    """

    def __init__(self, module: torch.nn.Module, rank: int = 0) -> None:
        self._module, self._rank = module, rank

    def storages(self) -> dict[str, torch.Tensor]:
        """Return the live parameters and buffers by name; nothing is copied."""
        seen: set[tuple[object, ...]] = set()
        live: dict[str, torch.Tensor] = {}
        for name, value in self._module.state_dict(keep_vars=True).items():
            if not isinstance(value, torch.Tensor):
                continue
            tensor = value.detach()
            # Two views of one memory are tied only if they show it alike; meta tensors have none.
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and not tensor.is_meta and key in seen:
                continue
            seen.add(key)
            live[name] = tensor
        return live

    def manifest(self) -> Manifest:
        """Return one box per HF tensor.

        Raises:
            UnsupportedLayout: a parameter that is distributed, quantized or of an unknown dtype.
        """
        live = self.storages()
        faults = [f"{name}: {fault}" for name, t in live.items() if (fault := _unplain(name, t))]
        if faults:
            raise UnsupportedLayout("not a plain module", faults)
        infos, boxes = [], []
        for storage, tensor in live.items():
            for part in hf_parts(storage, tensor.shape):
                infos.append(TensorInfo(part.name, part.shape, _dtype(tensor)))
                first = sum(i * s for i, s in zip(part.rect[0], tensor.stride(), strict=True))
                at = Placement(storage, first, tuple(tensor.stride(d) for d in part.dims))
                boxes.append(Box(part.name, (0,) * len(part.shape), part.shape, at))
        return Manifest.of(infos, {self._rank: boxes})


def _unplain(name: str, tensor: torch.Tensor) -> str:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"expected a plain tensor, found {type(tensor).__name__}"
    if tensor.is_meta:
        return "expected data, found a meta tensor"
    if _dtype(tensor) not in ITEMSIZE:
        return f"dtype {_dtype(tensor)} cannot travel"
    if name.endswith(".experts.gate_up_proj") and tensor.dim() == 3 and tensor.shape[1] % 2:
        return f"expected gate and up halves [E, 2I, H], found {tuple(tensor.shape)}"
    return ""


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
