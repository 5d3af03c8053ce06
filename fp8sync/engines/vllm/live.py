"""A worker's live weights, read back into load form whatever its kernels made of them.

Three ways, in this order. A storage whose module needs no processing, or was proven to keep every value,
is read as it lies. A linear layer is asked: its own kernel, given the rows of an identity matrix, answers
with its weight, exactly, as every product but one is zero. This reads packed copies that live in
closures or in C++, and shows what the layer computes with. Any other module whose processing moves
elements without changing them is marked: positions are written, base 256, where values go, processed by
vLLM, and found again. What fits none of the three is `Unreadable`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from fp8sync.audit.ledger import Ledger
from fp8sync.audit.units import (
    Held,
    Unit,
    Unreadable,
    as_kv_scale,
    check_readable,
    is_kv_scale,
    units_of,
)
from fp8sync.engines.vllm import compat
from fp8sync.engines.vllm.install import default_dtype, place, process_module
from fp8sync.engines.vllm.load_form import ModuleState, to_load_form
from fp8sync.plan.boxes import touched_blocks
from fp8sync.wire.payload import dequantized, view

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from fp8sync.engines.vllm.storage import EngineLayout, StorageSpec
    from fp8sync.plan import Plan

__all__ = ["LiveWeights", "worker_ledger"]

_ROWS_AT_ONCE = 1024
_BASE = 256
"""BF16 holds the integers below it exactly."""


class LiveWeights:
    """Reads storages of a live model; the last module's are kept, as units come module by module.

    Args:
        model: the live vLLM model; unchanged afterwards. It must not run meanwhile.
        layout: form of every storage.
        direct: modules proven to hold staged bytes as they are.
        device: the worker's.
        dtype: the model's.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layout: EngineLayout,
        direct: Collection[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._layout, self._direct = model, layout, direct
        self._device, self._dtype = device, dtype
        self._name: str | None = None
        self._read: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def storage(self, name: str) -> torch.Tensor:
        """Return a storage in load form.

        Raises:
            Unreadable: the kernel's form of it is not known.
        """
        if name != self._name:
            self._read = {name: self._find(name)}
            self._name = name
        return self._read[name]

    def kv_scale(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a KV-cache scale; NaN where the device's and the host's disagree."""
        prefix, _, scale = name.rpartition(".")
        module: Any = self._model.get_submodule(prefix)
        device = getattr(module, f"_{scale}").to("cpu", torch.float32)
        host = torch.tensor(getattr(module, f"_{scale}_float"), dtype=torch.float32)
        agreed = torch.where(device == host, device, torch.nan)
        return as_kv_scale(agreed.reshape(()), dtype)

    def _find(self, name: str) -> torch.Tensor:
        prefix, _, local = name.rpartition(".")
        module, spec = self._model.get_submodule(prefix), self._layout.storages[name]
        live: Any = getattr(module, local, None)
        method = getattr(module, "quant_method", None)
        in_place = isinstance(live, torch.Tensor) and _same_form(live, spec)
        if prefix in self._direct or not isinstance(method, QuantizeMethodBase):
            if not in_place:
                raise Unreadable(f"{name} has another form than when it was loaded")
            return live.detach()
        if compat.kernels_live_in_parameters(self._device):
            # Unprocessed parameters keep their address; what was processed has to be marked.
            return self._marked(name, module, local, live)
        if isinstance(module, (LinearBase, ParallelLMHead)):
            return self._asked(name, module, local, spec) if local == "weight" else live.detach()
        if in_place and not hasattr(module, "w13_weight"):
            return live.detach()
        return self._marked(name, module, local, live)

    def _asked(
        self, name: str, module: torch.nn.Module, local: str, spec: StorageSpec
    ) -> torch.Tensor:
        """Read a linear layer's weight through its own kernel."""
        if spec.dtype != self._dtype or len(spec.size) != 2:
            raise Unreadable(f"{name}: {local} is processed, and not of the model's dtype")
        outputs, inputs = spec.size
        method: Any = module.quant_method
        columns = []
        for first in range(0, inputs, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, inputs - first)
            rows = torch.zeros(count, inputs, dtype=self._dtype, device=self._device)
            rows[torch.arange(count), first + torch.arange(count)] = 1
            columns.append(method.apply(module, rows, None)[:, :outputs])
        return torch.cat(columns).t().contiguous()

    def _marked(self, name: str, module: torch.nn.Module, local: str, live: Any) -> torch.Tensor:
        """Invert the processing of a module that only moves elements."""
        spec = self._layout.storages[name]
        if spec.dtype != torch.bfloat16 or not isinstance(live, torch.Tensor):
            raise Unreadable(f"{type(module).__name__} keeps {local} in a form of its kernel's own")
        count = live.numel()
        places = torch.zeros(count, dtype=torch.int64, device=self._device)
        numbers = torch.arange(count, device=self._device)
        digits = max(1, -(-(count - 1).bit_length() // 8))
        if tuple(spec.size) and torch.Size(spec.size).numel() != count:
            raise Unreadable(f"{type(module).__name__} changes the size of {local}")
        for power in range(digits):
            digit = (numbers // _BASE**power % _BASE).to(spec.dtype)
            places += self._processed(module, local, digit).long() * _BASE**power
        if not torch.equal(places.sort().values, numbers):
            raise Unreadable(f"{type(module).__name__} changes values of {local}")
        flat = torch.empty_like(live.detach().reshape(-1))
        flat[places] = live.detach().reshape(-1)
        return flat.view(spec.size)

    def _processed(self, module: torch.nn.Module, local: str, values: torch.Tensor) -> torch.Tensor:
        state = ModuleState.capture(module)
        try:
            to_load_form(module)
            with self._device, default_dtype(self._dtype):
                for other, tensor in list(module._parameters.items()):
                    if tensor is not None and tensor.is_meta:
                        given = torch.zeros(tensor.shape, dtype=tensor.dtype)
                        place(module, other, values.view(tensor.shape) if other == local else given)
                process_module(module)
            return getattr(module, local).detach().reshape(-1).clone()
        except Exception as error:
            raise Unreadable(f"{type(module).__name__} cannot be marked: {error}") from error
        finally:
            state.restore()


def worker_ledger(
    open_live: Callable[[], LiveWeights], plan: Plan, rank: int, bucket_bytes: int
) -> Ledger:
    """Return the ledger of an engine worker, for one audit."""
    live = open_live()

    def read(unit: Unit) -> Held:
        check_readable(plan, unit)
        copy = unit.part.copy
        if is_kv_scale(plan.tensors[copy.tensor]):
            return Held.of(live.kv_scale(copy.tensor, getattr(torch, copy.dtype)), None)
        weight = view({copy.at.storage: live.storage(copy.at.storage)}, copy.at, copy.shape)
        if copy.scale_at is None:
            return Held.of(weight, None)
        storage, (first, blocks) = copy.scale_at.storage, touched_blocks(copy.rect)
        # Of a block that is cut, the first of the copies carries the scale; all are looked at by it.
        at = copy.scale_at.at([a - b for a, b in zip(first, copy.scale_rect[0], strict=True)])
        scale = view({storage: live.storage(storage)}, at, blocks)
        if plan.is_cut(copy):
            return Held.of(dequantized(weight, scale, copy.origin, torch.float32), None)
        return Held.of(weight, scale)

    return Ledger(units_of(plan, rank, bucket_bytes), read)


def _same_form(live: torch.Tensor, spec: StorageSpec) -> bool:
    return (tuple(live.shape), live.dtype, live.stride()) == (spec.size, spec.dtype, spec.strides)
