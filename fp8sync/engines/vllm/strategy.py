"""Which modules take staged bytes as they are (`direct`) and which vLLM has to process (`process`).

Nothing is assumed from names or shapes: FlashInfer's swapped gate and up, packed kernels for the processor
and Marlin keep the shape of what they change. Each module is given random weights in load form, processed
by vLLM, and put back; `direct` is trusted only where every value came out where it went in. Power-of-two
scales may be re-encoded (scale halved, codes doubled): the same values, so the same results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fp8sync.engines.vllm import compat
from fp8sync.engines.vllm.install import default_dtype, place, process_module
from fp8sync.engines.vllm.load_form import ModuleState, to_load_form
from fp8sync.recipe import Formula
from fp8sync_kernels import dequantize_blockwise

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fp8sync.engines.vllm.storage import EngineLayout, StorageSpec

__all__ = ["direct_modules"]


def direct_modules(
    model: torch.nn.Module, layout: EngineLayout, device: torch.device, dtype: torch.dtype
) -> tuple[set[str], dict[str, str]]:
    """Return the names of the modules whose live storages may be overwritten with staged bytes.

    And what was raised where the proof did not end: vLLM cannot process a module alone, or no memory.
    """
    if not compat.kernels_live_in_parameters(device):
        return set(), {}
    staged: dict[str, dict[str, str]] = {}
    for storage in layout.storages:
        prefix, _, local = storage.rpartition(".")
        staged.setdefault(prefix, {})[local] = storage
    special = {a.rpartition(".")[0] for a in (*layout.aliases, *layout.aliases.values())}
    special |= layout.processed
    formulas = _formulas(layout)
    proven: set[str] = set()
    failed: dict[str, str] = {}
    for prefix, module in model.named_modules():
        names = staged.get(prefix)
        if names and prefix not in special:
            specs = {local: layout.storages[storage] for local, storage in names.items()}
            kinds = {local: formulas.get(storage) for local, storage in names.items()}
            try:
                if _keeps_values(module, specs, kinds, device, dtype):
                    proven.add(prefix)
            # Left to the strategy that processes all in order, and says what fails there.
            except Exception as error:  # noqa: BLE001
                failed[prefix] = f"{type(error).__name__}: {error}"
    return proven, failed


def _formulas(layout: EngineLayout) -> dict[str, Formula | None]:
    """Formula by storage of scale_inv."""
    found: dict[str, Formula | None] = {}
    for boxes in layout.manifest.ranks.values():
        for box in boxes:
            if box.scale_at is not None:
                found[box.scale_at.storage] = layout.manifest.tensors[box.tensor].formula
    return found


@torch.no_grad()
def _keeps_values(
    module: torch.nn.Module,
    specs: Mapping[str, StorageSpec],
    formulas: Mapping[str, Formula | None],
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    live = {**module._parameters, **module._buffers}
    for local, spec in specs.items():
        tensor = live.get(local)
        if tensor is None or tuple(tensor.shape) != spec.size or tensor.dtype != spec.dtype:
            return False
        if not tensor.is_contiguous() or spec.strides != tensor.stride():
            return False
    if _foreign_references(module, live):
        return False
    given = {local: _random(spec, formulas[local], device) for local, spec in specs.items()}
    kept = {local: tensor.clone() for local, tensor in given.items()}
    state = ModuleState.capture(module)
    try:
        to_load_form(module)
        with default_dtype(dtype):
            for local, tensor in given.items():
                if not getattr(module, local).is_meta:
                    return False
                place(module, local, tensor)
            process_module(module)
        after = {**module._parameters, **module._buffers}
        return _same_values(kept, {local: after.get(local) for local in specs})
    finally:
        state.restore()


def _random(spec: StorageSpec, formula: Formula | None, device: torch.device) -> torch.Tensor:
    shape = spec.size
    if spec.dtype == torch.float8_e4m3fn:
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        codes[(codes & 0x7F) == 0x7F] = 0x31  # not NaN
        return codes.view(torch.float8_e4m3fn)
    if formula is Formula.POW2:
        exponents = torch.randint(-14, -4, shape, device=device)
        return torch.exp2(exponents.to(spec.dtype))
    if formula is Formula.FP32:
        # Down to those of dead experts' blocks: FlashInfer keeps its own above 1e-10.
        return (10 ** (-20 * torch.rand(shape, dtype=torch.float32, device=device))).to(spec.dtype)
    return torch.randn(shape, dtype=torch.float32, device=device).to(spec.dtype)


def _same_values(
    given: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor | None]
) -> bool:
    for local, before in given.items():
        after = found[local]
        if after is None or after.shape != before.shape or after.dtype != before.dtype:
            return False
        if local.endswith("_scale_inv") and local.removesuffix("_scale_inv") in given:
            continue
        scale = local + "_scale_inv"
        if before.dtype == torch.float8_e4m3fn and scale in given:
            new_scale = found[scale]
            if new_scale is None or new_scale.shape != given[scale].shape:
                return False
            if _same_bits(before, after) and _same_bits(given[scale], new_scale):
                continue
            pairs = zip(
                _planes(before),
                _planes(given[scale]),
                _planes(after),
                _planes(new_scale),
                strict=True,
            )
            for w, s, new_w, new_s in pairs:
                old = dequantize_blockwise(w, s, torch.float32)
                if not torch.equal(old, dequantize_blockwise(new_w, new_s, torch.float32)):
                    return False
        elif not _same_bits(before, after):
            return False
    return True


def _same_bits(before: torch.Tensor, after: torch.Tensor) -> bool:
    return torch.equal(_bits(before), _bits(after))


def _planes(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from tensor.reshape(-1, *tensor.shape[-2:])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _foreign_references(module: torch.nn.Module, live: Mapping[str, Any]) -> bool:
    """Whether the module's kernel holds a copy of a parameter under another address."""
    shapes = {(t.shape, t.dtype): t.data_ptr() for t in live.values() if t is not None}
    addresses = {t.data_ptr() for t in live.values() if t is not None}
    for tensor in _tensors_in(getattr(module, "quant_method", None), 4, set()):
        known = shapes.get((tensor.shape, tensor.dtype))
        if known is not None and tensor.data_ptr() not in addresses:
            return True
    return False


def _tensors_in(value: Any, depth: int, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen or depth < 0 or isinstance(value, torch.nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item, depth - 1, seen)
    elif type(value).__module__.startswith("vllm"):
        for item in getattr(value, "__dict__", {}).values():
            yield from _tensors_in(item, depth - 1, seen)
