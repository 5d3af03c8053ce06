"""vLLM modules in load form: as its own loaders expect them, before any kernel repacked a weight.

vLLM records each module's construction-time parameters (`model_loader.reload`) so that it can load
again after kernels changed the layout. We use that record twice: on meta, to trace where loaders
write, and with staged tensors, to let vLLM process new weights.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

__all__ = ["ModuleState", "load_form", "storages_of", "to_load_form"]


@dataclass
class ModuleState:
    """What a module's `__dict__` held, deep enough to undo weight processing.

    Kernels keep state on the module, on its `quant_method` and on the objects that one holds
    (kernel objects, packed closures), so these are remembered too.
    """

    owners: list[tuple[Any, dict[str, Any]]]

    @classmethod
    def capture(cls, module: torch.nn.Module) -> ModuleState:
        """Remember the module as it is; no tensor is copied."""
        method = getattr(module, "quant_method", None)
        owners: list[Any] = [module]
        if method is not None and hasattr(method, "__dict__"):
            owners.append(method)
            owners += [v for v in vars(method).values() if _is_kernel(v)]
        return cls([(owner, _shallow(owner)) for owner in owners])

    def restore(self) -> None:
        """Put everything back; tensors written in place are not undone."""
        for owner, attributes in self.owners:
            current = vars(owner)
            current.clear()
            current.update({k: _copy_if_dict(v) for k, v in attributes.items()})


def _shallow(owner: Any) -> dict[str, Any]:
    return {k: _copy_if_dict(v) for k, v in vars(owner).items()}


def _copy_if_dict(value: Any) -> Any:
    # _parameters, _buffers and the like are changed in place.
    return value.copy() if isinstance(value, (dict, set)) else value


def _is_kernel(value: Any) -> bool:
    return type(value).__module__.startswith("vllm.model_executor") and hasattr(value, "__dict__")


def to_load_form(module: torch.nn.Module) -> None:
    """Put a module's construction-time parameters back, on the meta device."""
    restore_layer_on_meta(module, get_layerwise_info(module))


@contextmanager
def load_form(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Keep modules in load form, on meta, for the duration; then exactly as before."""
    states = []
    try:
        for module in modules:
            states.append(ModuleState.capture(module))
            to_load_form(module)
        yield
    finally:
        for state in reversed(states):
            state.restore()


def storages_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, torch.Tensor]]:
    """Yield (qualified name, module, local name, tensor) of all parameters and buffers, unshared."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{prefix}.{name}" if prefix else name, module, name, tensor
