"""The `process` strategy: vLLM's own post-processing on staged bytes, then one copy into the live model.

`prepare` puts the affected modules into load form with the staged tensors, lets vLLM's loader take the
misc tensors and its quantization methods process the weights, and puts the live modules back: the
model is as before, the results are held aside. `commit` copies them into the live storages, whose
addresses never change. Until `commit` any failure leaves the old weights in place.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from fp8sync.engines.vllm import compat
from fp8sync.engines.vllm.attention import AttentionInstall
from fp8sync.engines.vllm.load_form import ModuleState, to_load_form
from fp8sync.engines.vllm.misc import check_finite, load_misc, unloaded
from fp8sync.engines.vllm.storage import MISC, module_of
from fp8sync.errors import InstallFailed, NonFiniteWeight

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping

    from fp8sync.engines.vllm.storage import EngineLayout

__all__ = ["ProcessInstall", "default_dtype", "place", "process_module"]

_CONTAINERS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


@dataclass
class _Processed:
    """One module before and after processing."""

    name: str
    module: torch.nn.Module
    before: ModuleState
    after: ModuleState | None = None


class ProcessInstall:
    """The way of versions, or of one portion of each, into a model; made once, as it looks at every module.

    Args:
        model: the live vLLM model.
        layout: what is staged and where it belongs.
        device: the worker's device.
        dtype: the model's dtype; vLLM processes weights with it as torch's default.
        skip: modules that are installed otherwise.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layout: EngineLayout,
        device: torch.device,
        dtype: torch.dtype,
        skip: Container[str] = (),
    ) -> None:
        self._model: Any = model  # every vLLM model has load_weights
        self._layout = layout
        self._device, self._dtype = device, dtype
        staged = _by_module((*layout.storages, *layout.aliases))
        self._targets = [
            (prefix, module, staged[prefix])
            for prefix, module in model.named_modules()
            if prefix in staged and prefix not in skip
        ]
        self._staging: Mapping[str, torch.Tensor] = {}
        self._modules: list[_Processed] = []
        self._live: list[tuple[torch.Tensor, torch.Tensor]] = []
        sent = {module_of(name) for name in layout.storages if not name.startswith(MISC)}
        self._attention = AttentionInstall(model, layout.kv_scales, dtype, sent)

    @property
    def modules(self) -> int:
        """How many modules vLLM processes."""
        return len(self._targets)

    @torch.no_grad()
    def prepare(self, staging: Mapping[str, torch.Tensor]) -> None:
        """Process everything into staging.

        Args:
            staging: filled tensors by storage name; they belong to this install until it is over.

        Raises:
            InstallFailed: what vLLM raised, or a result that does not fit the live storage. The model
                is as before.
            NonFiniteWeight: its loader made Inf of a tensor of the misc path. The model is as before.
        """
        at, self._staging = "", staging
        try:
            with self._device, default_dtype(self._dtype):
                self._enter_load_form()
                self._attention.enter()
                load_misc(self._model, self._staging, self._layout.quantize)
                check_finite(self._model, self._layout, self._staging)
                faults = unloaded(self._model, self._layout.open)
            with default_dtype(self._dtype):
                for entry in self._modules:
                    at = f"{entry.name}: "
                    process_module(entry.module)
                    entry.after = ModuleState.capture(entry.module)
                at = ""
            with self._device, default_dtype(self._dtype):
                self._attention.process()
            self._attention.restore()
            for entry in self._modules:
                entry.before.restore()
            faults += [fault for entry in self._modules for fault in _misfits(entry)]
            faults += self._attention.misfits()
        except NonFiniteWeight:
            self.abandon()
            raise
        # vLLM's processing may raise anything; whatever it is, the old weights go back first.
        except Exception as error:
            self.abandon()
            raise InstallFailed(f"{at}{type(error).__name__}: {error}") from error
        if faults:
            self.abandon()
            raise InstallFailed("processed weights do not fit the live storages", faults)

    @torch.no_grad()
    def commit(self) -> None:
        """Copy the processed weights into the live storages."""
        for entry in self._modules:
            after = entry.after
            if after is None:
                continue
            new = _tensors(after)
            for name, live in _tensors(entry.before).items():
                if name in new:
                    live.data.copy_(new[name])
            if not compat.kernels_live_in_parameters(self._device):
                _adopt_kernels(entry.module, after)
        self._attention.commit()
        self._release()

    def abandon(self) -> None:
        """Put the live modules back as they were."""
        self._attention.restore()
        for entry in reversed(self._modules):
            entry.before.restore()
        for live, saved in reversed(self._live):
            live.data.copy_(saved)
        self._release()

    def _release(self) -> None:
        self._attention.release()
        self._modules, self._live, self._staging = [], [], {}

    def _enter_load_form(self) -> None:
        for prefix, module, locals_ in self._targets:
            entry = _Processed(prefix, module, ModuleState.capture(module))
            self._modules.append(entry)
            live = dict(module._buffers)
            to_load_form(module)
            for local, tensor in module._buffers.items():
                if local not in locals_ and tensor is not None and tensor.is_meta:
                    module._buffers[local] = live[local].clone()  # computed by vLLM, never loaded
            for local in locals_:
                self._place(module, f"{prefix}.{local}" if prefix else local, local)

    def _place(self, module: torch.nn.Module, storage: str, local: str) -> None:
        """Give the module the staged tensor for one of its parameters or buffers."""
        current = getattr(module, local)
        value = self._staging.get(self._layout.aliases.get(storage, storage))
        if value is None:
            return
        if not current.is_meta:  # vLLM keeps it out of load form: written live, undone on failure
            self._live.append((current, current.data.clone()))
            current.data.copy_(value)
            return
        place(module, local, value)


def place(module: torch.nn.Module, local: str, value: torch.Tensor) -> None:
    """Give a module in load form real memory for one of its meta parameters or buffers."""
    current = getattr(module, local)
    value = value.detach()
    value.__class__ = current.__class__
    value.__dict__ = current.__dict__.copy()
    setattr(module, local, value)


@torch.enable_grad()
def process_module(module: torch.nn.Module) -> None:
    """Let vLLM process one module's weights, as after a first load.

    In the same modes, too: DeepGEMM's scales go through a function that torch has compiled then, and would
    compile anew, for seconds, under `no_grad` or a default device.
    """
    vars(module).pop("_already_called_process_weights_after_loading", None)
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase):
        method.process_weights_after_loading(module)
        refresh: Any = getattr(module, "update_param_tp_status", None)
        if refresh is not None:
            refresh()


def _by_module(storages: Iterable[str]) -> dict[str, list[str]]:
    """Return the local names of staged parameters and buffers, by module."""
    found: dict[str, list[str]] = {}
    for storage in storages:
        if not storage.startswith(MISC):
            prefix, _, local = storage.rpartition(".")
            found.setdefault(prefix, []).append(local)
    return found


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` torch's default for the duration, as vLLM does while it loads."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _tensors(state: ModuleState) -> dict[str, torch.Tensor]:
    attributes = state.owners[0][1]
    both = {**attributes["_parameters"], **attributes["_buffers"]}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _misfits(entry: _Processed) -> list[str]:
    if entry.after is None:
        return []
    new = _tensors(entry.after)
    faults = []
    for name, live in _tensors(entry.before).items():
        if name in new:
            found, want = _form(new[name]), _form(live)
            if found != want:
                faults.append(f"{entry.name}.{name}: expected {want}, found {found}")
        elif name in entry.module._parameters:
            faults.append(f"{entry.name}.{name}: expected {_form(live)}, found nothing")
    return faults


def _form(tensor: torch.Tensor) -> str:
    place = "meta" if tensor.is_meta else tensor.device.type
    return f"{tuple(tensor.shape)} {tensor.dtype} on {place}"


def _adopt_kernels(module: torch.nn.Module, after: ModuleState) -> None:
    """Take over packed copies and closures, which hold the new weights; keep the live tensors."""
    for owner, attributes in after.owners:
        if owner is module:
            vars(module).update({k: v for k, v in attributes.items() if k not in _CONTAINERS})
        else:
            vars(owner).update(attributes)
