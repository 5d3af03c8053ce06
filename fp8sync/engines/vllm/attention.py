"""What attention modules get of a version: KV-cache scales, and MLA's weights derived from kv_b_proj.

Both follow after all linears are processed, into shadows of the module's tensors, and are copied to the
live ones at commit: their addresses stay, as captured CUDA graphs need. (vLLM 0.25 binds W_UV and W_UK_T
to new memory after each load.) MLA has no KV-cache scales of its own; those of the live module stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from fp8sync.engines.vllm import compat
from fp8sync.engines.vllm.kv_cache import (
    add_scale_parameters,
    forget_folded_scales,
    process_scales,
    scale_floats,
)
from fp8sync.engines.vllm.load_form import ModuleState

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = ["AttentionInstall"]


@dataclass
class _Entry:
    name: str
    module: Any
    mla: bool
    before: ModuleState
    live: dict[str, torch.Tensor]
    new: dict[str, torch.Tensor | None]
    floats: dict[str, float]


class AttentionInstall:
    """The attention modules' share of a version; made once, as it looks at every module.

    Args:
        model: the live model.
        kv_scales: modules that are sent scales.
        dtype: the model's dtype.
        sent: modules that are sent weights, from which others may be derived.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        kv_scales: Collection[str],
        dtype: torch.dtype,
        sent: Iterable[str],
    ) -> None:
        self._dtype = dtype
        self._scaled = bool(kv_scales)
        weights = {id(model.get_submodule(name)) for name in sent}
        self._targets: list[tuple[str, torch.nn.Module, bool]] = []
        for name, module in model.named_modules():
            mla = any(id(origin) in weights for origin in compat.derived_from(module))
            if mla or name in kv_scales:
                self._targets.append((name, module, mla))
        self._entries: list[_Entry] = []

    def enter(self) -> None:
        """Put shadows of their tensors into the modules, and parameters to load scales into."""
        self._entries = []
        for name, module, mla in self._targets:
            state = ModuleState.capture(module)
            self._entries.append(_Entry(name, module, mla, state, _tensors(module), {}, {}))
            _shadow(module)
        if self._scaled:
            for entry in self._entries:
                add_scale_parameters(entry.module)

    def process(self) -> None:
        """Let vLLM derive what it derives; the linears' modules hold the new weights meanwhile."""
        for entry in self._entries:
            if entry.mla:
                entry.module.process_weights_after_loading(self._dtype)
                keep = [n for n, t in entry.live.items() if t.numel() > 1]
            else:
                process_scales(entry.module)
                entry.floats = scale_floats(entry.module)
                keep = [n for n, t in entry.live.items() if t.numel() == 1]
            found = _tensors(entry.module)
            entry.new = {n: t for n in keep if (t := found.get(n)) is not entry.live[n]}

    def restore(self) -> None:
        """Put the live tensors back."""
        for entry in reversed(self._entries):
            entry.before.restore()

    def misfits(self) -> list[str]:
        """Return which derived weights do not fit the live ones; after `restore`."""
        return [
            f"{entry.name}.{name}: expected {_form(entry.live[name])}, found {_form(found)}"
            for entry in self._entries
            for name, found in entry.new.items()
            if _form(found) != _form(entry.live[name])
        ]

    def commit(self) -> None:
        """Copy to the live tensors and host floats."""
        for entry in self._entries:
            for name, value in entry.new.items():
                if value is not None:
                    entry.live[name].data.copy_(value)
            if entry.floats and entry.floats != scale_floats(entry.module):
                vars(entry.module).update(entry.floats)
                forget_folded_scales(entry.module)

    def release(self) -> None:
        """Let go of what was derived."""
        self._entries = []


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    groups = module._parameters, module._buffers, vars(module)
    return {n: t for group in groups for n, t in group.items() if isinstance(t, torch.Tensor)}


def _shadow(module: torch.nn.Module) -> None:
    recorded = get_layerwise_info(module).restore_metadata[0]
    for name in [n for n in module._parameters if n not in recorded]:
        del module._parameters[name]  # derived: vLLM would write into it in place
    for group in (module._buffers, vars(module)):
        for name, tensor in list(group.items()):
            if isinstance(tensor, torch.Tensor) and tensor.numel() == 1:
                group[name] = tensor.clone()


def _form(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
