"""This worker's boxes: which rectangle of each HF tensor it keeps, and where, in load form."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from fp8sync.engines.vllm import compat
from fp8sync.engines.vllm.load_form import load_form, storages_of
from fp8sync.engines.vllm.trace import Trace, Write, trace_load
from fp8sync.errors import RecipeMismatch, TensorMismatch, UnsupportedLayout
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan.boxes import Rect, block_shape, misaligned_dim, overlap, overlapping, volume
from fp8sync.plan.coverage import union_volume
from fp8sync.recipe import BLOCK, Encoding, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["MISC", "EngineLayout", "StorageSpec", "describe_engine"]

logger = logging.getLogger(__name__)
MISC = "misc/"
"""Prefix of storages that hold whole HF tensors for the engine's own loader."""


@dataclass(frozen=True)
class StorageSpec:
    """The form of one staged tensor, and the constants a load writes into it."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    constants: tuple[tuple[Rect, float], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last."""
        last = sum((n - 1) * step for n, step in zip(self.size, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize if math.prod(self.size) else 0

    def fill(self, tensor: torch.Tensor) -> torch.Tensor:
        """Write the constants into a tensor of this form and return it."""
        for (start, shape), value in self.constants:
            tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))] = value
        return tensor


@dataclass(frozen=True)
class EngineLayout:
    """What a worker wants and how it stages it.

    Args:
        manifest: this worker's boxes.
        storages: form of every staged storage, by name.
        aliases: parameters shared by several modules (tied weights): name -> first name.
        by_loader: modules into which vLLM's own loader puts misc tensors.
    """

    manifest: Manifest
    storages: Mapping[str, StorageSpec]
    aliases: Mapping[str, str]
    by_loader: frozenset[str]


def describe_engine(
    model: torch.nn.Module, held: Sequence[TensorInfo], recipe: Recipe, rank: int
) -> EngineLayout:
    """Trace the model's loader and list this worker's boxes.

    Args:
        model: the live vLLM model; it is the same, bit for bit, afterwards.
        held: the trainer's tensors, in the order to load them.
        recipe: what the engine is to hold.
        rank: this worker's rank among the engine's workers.

    Raises:
        TensorMismatch: the engine's loader refuses a tensor, or a parameter stays unfilled.
        RecipeMismatch: the engine's formats are not the recipe's.
        UnsupportedLayout: two tensors share a destination, or a module cannot be refitted yet.
    """
    return _Describer(model, held, recipe, rank).run()


class _Describer:
    def __init__(
        self, model: torch.nn.Module, held: Sequence[TensorInfo], recipe: Recipe, rank: int
    ) -> None:
        self.model, self.recipe, self.rank = model, recipe, rank
        self.held = {info.name: info for info in held}
        self.modules: dict[str, torch.nn.Module] = {}
        self.targets: dict[str, torch.Tensor] = {}

    def run(self) -> EngineLayout:
        mla = [n for n, m in self.model.named_modules() if compat.is_mla(m)]
        if mla:
            raise UnsupportedLayout("MLA engines cannot be refitted yet", mla)
        aliases = _shared_parameters(self.model)
        with load_form(self.model.modules()):
            for name, module, _, tensor in storages_of(self.model):
                self.modules[name], self.targets[name] = module, tensor
            plain = trace_load(self.model, self._standins(), self.targets)
            self._check_failures(plain)
            quantized = self._quantized(plain)
            pairs = trace_load(self.model, self._pair_standins(quantized), self.targets)
        return self._layout(plain, pairs, quantized, aliases)

    def _standins(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
            for name, info in self.held.items()
        }

    def _pair_standins(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        standins = {}
        for name in names:
            shape = self.held[name].shape
            standins[name] = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
            standins[name + "_scale_inv"] = torch.empty(block_shape(shape), device="meta")
        return standins

    def _check_failures(self, trace: Trace) -> None:
        faults = []
        for name, reason in trace.failures.items():
            if "meta" in reason or "DataDependent" in reason:
                trace.transforms[name] = f"the loader looks at the data ({reason})"
            else:
                faults.append(f"{name}: trainer shape {self.held[name].shape}; {reason}")
        if faults:
            raise TensorMismatch("the engine's loader refuses these tensors", faults)

    def _quantized(self, trace: Trace) -> list[str]:
        """Names whose destinations are FP8; checked against the recipe."""
        fp8 = torch.float8_e4m3fn
        names = [n for n, ws in trace.writes.items() if any(self._dtype(w) == fp8 for w in ws)]
        if names and not self.recipe.quantizes:
            found = [f"{n}: expected unquantized, found {fp8}" for n in names]
            raise RecipeMismatch("recipe 'bf16' for an engine that holds FP8 weights", found)
        if names and self.recipe.dequantize:
            raise RecipeMismatch("dequantize is for engines without FP8; this one holds FP8", names)
        if not names and self.recipe.quantizes and not self.recipe.dequantize:
            raise RecipeMismatch(
                f"recipe {self.recipe.name!r} needs an engine with blockwise FP8 weights "
                "(quant_method fp8, weight_block_size [128, 128]); this one holds none"
            )
        return names

    def _dtype(self, write: Write) -> torch.dtype:
        return self.targets[write.storage].dtype

    def _layout(
        self, plain: Trace, pairs: Trace, quantized: Sequence[str], aliases: Mapping[str, str]
    ) -> EngineLayout:
        infos: dict[str, TensorInfo] = {}
        boxes: list[Box] = []
        paired = set(quantized)
        for name, held in self.held.items():
            reason = plain.transforms.get(name) or pairs.transforms.get(name, "")
            writes = (pairs if name in paired else plain).writes.get(name, [])
            info = self._wanted(held, writes, name in paired)
            found = None if reason else self._boxes(info, writes, pairs)
            if found is None:
                info = replace(info, misc=reason or "its scales cannot be cut where the weight is")
                found = [_misc_box(info, self.recipe)]
            infos[name] = info
            boxes += found
        for trace in (plain, pairs):
            self._check_overlaps(trace)
        touched = self._touched(plain, pairs)
        self._check_filled(plain, pairs, aliases)
        storages = {n: self._spec(n, plain) for n in touched}
        storages |= self._misc_storages(infos)
        misc = {n for n, i in infos.items() if i.misc}
        manifest = Manifest.of(infos.values(), {self.rank: boxes})
        return EngineLayout(manifest, storages, aliases, self._by_loader(plain, pairs, misc))

    def _by_loader(self, plain: Trace, pairs: Trace, misc: set[str]) -> frozenset[str]:
        targets = set(plain.transformed) | set(pairs.transformed)
        for trace in (plain, pairs):
            for name, writes in trace.writes.items():
                if name in misc or name.removesuffix("_scale_inv") in misc:
                    targets |= {w.storage for w in writes}
        if plain.failures:  # such a tensor may go anywhere
            targets |= set(self.targets)
        return frozenset(t.rpartition(".")[0] for t in targets)

    def _wanted(self, held: TensorInfo, writes: Sequence[Write], paired: bool) -> TensorInfo:
        if paired:
            kept = compat.kept_formula(self.modules[writes[0].storage]) if writes else None
            formula = self.recipe.formula(kept) if kept else None
            return replace(
                held, dtype="float8_e4m3fn", encoding=Encoding.BLOCKWISE, formula=formula
            )
        dtype = _name(self._dtype(writes[0])) if writes else held.dtype
        if not self.recipe.dequantize or len(held.shape) != 2 or not writes:
            return replace(held, dtype=dtype)
        module = self.modules[writes[0].storage]
        if self.recipe.leaves_unquantized(held.name) or not compat.holds_quantizable_weights(
            module
        ):
            return replace(held, dtype=dtype)
        formula = self.recipe.formula(compat.kept_formula(module))
        return replace(held, dtype=dtype, encoding=Encoding.BLOCKWISE, formula=formula)

    def _boxes(self, info: TensorInfo, writes: Sequence[Write], pairs: Trace) -> list[Box] | None:
        """The boxes of one tensor, or None where weight and scales cannot be cut alike."""
        boxes = []
        scales = pairs.writes.get(info.name + "_scale_inv", [])
        for write in writes:
            scale_at = None
            if info.encoding is Encoding.BLOCKWISE:
                if misaligned_dim(write.source, info.shape) is not None:
                    return None
                if not self.recipe.dequantize:
                    scale_at = _scale_placement(write.source, scales)
                    if scale_at is None:
                        return None
            at = Placement(write.storage, write.offset, write.strides)
            boxes.append(Box(info.name, *write.source, at, scale_at))
        return boxes

    def _check_overlaps(self, trace: Trace) -> None:
        by_storage: dict[str, list[Write]] = defaultdict(list)
        for writes in trace.writes.values():
            for write in writes:
                by_storage[write.storage].append(write)
        faults = [
            f"{writes[i].tensor} and {writes[j].tensor}: the engine's loader puts both at the same "
            f"place of {storage} (rank {self.rank})"
            for storage, writes in by_storage.items()
            for i, j in overlapping([w.target for w in writes])
        ]
        if faults:
            raise UnsupportedLayout(
                "the engine's loader overwrites one tensor with another; are all rows of fused "
                f"projections multiples of {BLOCK}?",
                faults,
            )

    def _touched(self, plain: Trace, pairs: Trace) -> list[str]:
        """All storages of the modules into which anything is loaded."""
        direct = {w.storage for t in (plain, pairs) for ws in t.writes.values() for w in ws}
        direct |= set(plain.transformed) | set(pairs.transformed)
        owners = {id(self.modules[name]): self.modules[name] for name in direct}
        attention = sorted(n for n in direct if compat.is_attention(self.modules[n]))
        if attention:
            raise UnsupportedLayout("KV-cache scales cannot be refitted yet", attention)
        return [
            n
            for n, t in self.targets.items()
            if id(self.modules[n]) in owners and (t.is_meta or n in direct)
        ]

    def _check_filled(self, plain: Trace, pairs: Trace, aliases: Mapping[str, str]) -> None:
        """Every parameter in load form must be written whole, or belong to a tensor on misc."""
        filled: dict[str, list[Rect]] = defaultdict(list)
        for trace in (pairs, plain):
            for writes in trace.writes.values():
                for w in writes:
                    filled[w.storage].append(w.target)
        shared = {aliases[n] for n in aliases}
        faults = []
        for name, tensor in self.targets.items():
            module = self.modules[name]
            parameter = name.rpartition(".")[2] in module._parameters
            if not parameter or compat.is_attention(module) or not tensor.numel():
                continue
            if name in plain.transformed or name in pairs.transformed or name in aliases:
                continue
            rects = {*filled[name], *(rect for rect, _ in plain.constants.get(name, ()))}
            missing = tensor.numel() - union_volume(rects)
            if missing and not (name in shared and filled[name]) and not plain.failures:
                faults.append(
                    f"{name} (engine rank {self.rank}): {missing} of {tensor.numel()} elements are "
                    f"filled by no tensor of the trainer; shape {tuple(tensor.shape)}"
                )
        if faults:
            raise TensorMismatch("the trainer lacks tensors that the engine needs", faults)

    def _spec(self, name: str, trace: Trace) -> StorageSpec:
        tensor = self.targets[name]
        constants = tuple(trace.constants.get(name, ()))
        return StorageSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype, constants)

    def _misc_storages(self, infos: Mapping[str, TensorInfo]) -> dict[str, StorageSpec]:
        specs = {}
        for name, info in infos.items():
            if info.misc:
                dtype = getattr(torch, info.dtype)
                specs[MISC + name] = StorageSpec(info.shape, _contiguous(info.shape), dtype)
                if info.encoding is Encoding.BLOCKWISE and not self.recipe.dequantize:
                    shape = block_shape(info.shape)
                    scale = StorageSpec(shape, _contiguous(shape), torch.float32)
                    specs[MISC + name + "_scale_inv"] = scale
        return specs


def _misc_box(info: TensorInfo, recipe: Recipe) -> Box:
    at = Placement(MISC + info.name, 0, _contiguous(info.shape))
    scale_at = None
    if info.encoding is Encoding.BLOCKWISE and not recipe.dequantize:
        strides = _contiguous(block_shape(info.shape))
        scale_at = Placement(MISC + info.name + "_scale_inv", 0, strides)
    return Box(info.name, (0,) * len(info.shape), info.shape, at, scale_at)


def _scale_placement(source: Rect, scales: Sequence[Write]) -> Placement | None:
    """Where the scales of the weight rectangle `source` go, if one write holds them all."""
    wanted = tuple(s // BLOCK for s in source[0]), block_shape(source[1])
    for write in scales:
        common = overlap(wanted, write.source)
        if common is not None and volume(common) == volume(wanted):
            within = [a - b for a, b in zip(wanted[0], write.source[0], strict=True)]
            return Placement(write.storage, write.offset, write.strides).at(within)
    return None


def _shared_parameters(model: torch.nn.Module) -> dict[str, str]:
    """Return {qualified name: first name} of parameters that several modules share (tied weights)."""
    first: dict[int, str] = {}
    aliases = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if (
                parameter is None
                or not get_layerwise_info(module).restore_metadata[0].get(name, parameter).numel()
            ):
                continue
            qualified = f"{prefix}.{name}" if prefix else name
            if first.setdefault(id(parameter), qualified) != qualified:
                aliases[qualified] = first[id(parameter)]
    return aliases


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
