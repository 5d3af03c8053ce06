"""This worker's boxes: which rectangle of each HF tensor it keeps, and where, in load form."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from fp8sync.engines.vllm import compat
from fp8sync.engines.vllm.connectors import check_connectors
from fp8sync.engines.vllm.experts import check_experts
from fp8sync.engines.vllm.further import not_of_main_model
from fp8sync.engines.vllm.kv_cache import add_scale_parameters, check_scales
from fp8sync.engines.vllm.load_form import load_form, storages_of
from fp8sync.engines.vllm.observe import observe
from fp8sync.engines.vllm.storage import (
    MISC,
    EngineLayout,
    StorageSpec,
    contiguous,
    misc_scales,
    misc_specs,
    module_of,
    scale_specs,
)
from fp8sync.errors import RecipeMismatch, TensorMismatch, UnsupportedLayout
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan.boxes import block_shape, misaligned_dim, overlap, overlapping, volume
from fp8sync.plan.coverage import union_volume
from fp8sync.recipe import BLOCK, Encoding, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8sync.engines.vllm.trace import Trace, Write
    from fp8sync.plan.boxes import Rect

__all__ = ["describe_engine"]


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
        UnsupportedLayout: two tensors share a destination, where one goes cannot be known, or the
            engine moves its experts (expert parallel load balancing).
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
        check_experts(self.model, self.rank)
        check_connectors(compat.kv_transfer_config(), self.rank)
        aliases = _shared_parameters(self.model)
        with load_form(self.model.modules()):
            with torch.device("meta"):
                add_scale_parameters(self.model)
            for name, module, _, tensor in storages_of(self.model):
                self.modules[name], self.targets[name] = module, tensor
            trace, quantized = observe(self.model, self.held, self.targets, self.rank)
            self._check_formats(trace, quantized)
        return self._layout(trace, quantized, aliases)

    def _check_formats(self, trace: Trace, names: Sequence[str]) -> None:
        """Compare what the engine keeps in FP8 with the recipe."""
        fp8 = torch.float8_e4m3fn
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
        unknown = [
            f"{name}: {trace.transforms[name]}; whether it goes into FP8 weights cannot be known"
            for name in trace.failures
            if names and name in self.held and len(self.held[name].shape) > 1
        ]
        if unknown:
            raise UnsupportedLayout("the engine's loader cannot be traced", unknown)

    def _layout(
        self, trace: Trace, quantized: Sequence[str], aliases: Mapping[str, str]
    ) -> EngineLayout:
        infos: dict[str, TensorInfo] = {}
        boxes: list[Box] = []
        paired = set(quantized)
        reached = trace.reached()
        kv_scales = self._kv_scales(reached)
        config = compat.text_config()
        for name, held in self.held.items():
            reason = trace.transforms.get(name, "")
            if not reason and not reached[name]:
                unused = not_of_main_model(name, config)
                if unused:
                    infos[name] = replace(held, misc="", unused=unused)
                    continue
            writes = trace.writes.get(name, [])
            info = self._wanted(held, sorted(reached[name]), name in paired)
            if any(compat.is_attention(self.modules[s]) for s in reached[name]):
                reason = "a KV-cache scale"
            if reason and name not in paired and held.encoding is Encoding.PLAIN:
                info = held  # the loader computes with what a checkpoint would hold
            reason = reason or held.misc
            found = None if reason else self._boxes(info, writes, trace)
            if found is None:
                info = replace(info, misc=reason or "its scales cannot be cut where the weight is")
                found = [_misc_box(info, self.recipe)]
            infos[name] = info
            boxes += found
        self._check_overlaps(trace)
        loose = self._check_filled(trace, aliases)
        misc = [i for i in infos.values() if i.misc]
        by_loader = {i.name for i in misc}
        loaded = _loaded(trace, [i.name for i in misc], loose)
        apart: list[TensorInfo] = []
        if self.recipe.scales == "misc":
            apart = [infos[n] for n in quantized if not infos[n].misc]
            names = {i.name + "_scale_inv" for i in apart}
            by_loader |= names
            loose |= {w.storage for n in names for w in trace.writes[n]}
        storages = {n: self._spec(n, trace) for n in self._touched(trace)}
        written = _written(trace, by_loader)
        storages |= {n: storages[n].poisoned(written[n]) for n in loose if n in storages}
        storages |= misc_specs(misc, scales=not self.recipe.dequantize)
        storages |= scale_specs(apart, boxes)
        return EngineLayout(
            manifest=Manifest.of(infos.values(), {self.rank: boxes}),
            storages=storages,
            aliases=aliases,
            processed=self._processed(trace, by_loader),
            open=loose,
            kv_scales=frozenset(kv_scales),
            by_loader=loaded,
        )

    def _kv_scales(self, reached: Mapping[str, set[str]]) -> set[str]:
        """Return the attention modules that are sent KV-cache scales, checked to be whole."""
        given: dict[str, set[str]] = defaultdict(set)
        for storages in reached.values():
            for storage in storages:
                if compat.is_attention(self.modules[storage]):
                    given[module_of(storage)].add(storage.rpartition(".")[2])
        graphs = bool(given) and compat.captures_full_graphs()
        check_scales(self.model, given, self.rank, full_graphs=graphs)
        return set(given)

    def _processed(self, trace: Trace, misc: set[str]) -> frozenset[str]:
        """Modules that the loader puts misc tensors into, or that others are derived from."""
        targets = set(trace.transformed)
        for name, writes in trace.writes.items():
            if name in misc or name.removesuffix("_scale_inv") in misc:
                targets |= {w.storage for w in writes}
        if trace.failures:  # such a tensor may go anywhere
            targets |= set(self.targets)
        origins = {id(m) for module in self.model.modules() for m in compat.derived_from(module)}
        derived = {name for name, module in self.model.named_modules() if id(module) in origins}
        return frozenset({module_of(t) for t in targets} | derived)

    def _wanted(self, held: TensorInfo, reached: Sequence[str], paired: bool) -> TensorInfo:
        if paired:
            fp8 = next(s for s in reached if self.targets[s].dtype == torch.float8_e4m3fn)
            formula = self.recipe.formula(compat.kept_formula(self.modules[fp8]))
            return replace(
                held, dtype="float8_e4m3fn", encoding=Encoding.BLOCKWISE, formula=formula
            )
        if not reached:
            return held
        dtype = _name(self.targets[reached[0]].dtype)
        plain = replace(held, dtype=dtype, encoding=Encoding.PLAIN, formula=None)
        if not self.recipe.dequantize or len(held.shape) != 2:
            return plain
        module = self.modules[reached[0]]
        if self.recipe.leaves_unquantized(held.name) or not compat.holds_quantizable_weights(
            module
        ):
            return plain
        formula = self.recipe.formula(compat.kept_formula(module))
        return replace(held, dtype=dtype, encoding=Encoding.BLOCKWISE, formula=formula)

    def _boxes(self, info: TensorInfo, writes: Sequence[Write], trace: Trace) -> list[Box] | None:
        """The boxes of one tensor, or None where weight and scales cannot be cut alike."""
        boxes = []
        scales = trace.writes.get(info.name + "_scale_inv", [])
        for write in writes:
            scale_at = None
            if info.encoding is Encoding.BLOCKWISE:
                if misaligned_dim(write.source, info.shape) is not None:
                    return None
                if not self.recipe.dequantize:
                    scale_at = _scale_placement(write.source, scales)
                    if scale_at is None:
                        return None
                    if self.recipe.scales == "misc":
                        whole = misc_scales(info)
                        scale_at = whole.at([a // BLOCK for a in write.source[0]])
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

    def _touched(self, trace: Trace) -> list[str]:
        """Return what is loaded, or may be, and all parameters of the modules that own it."""
        direct = {w.storage for writes in trace.writes.values() for w in writes}
        direct |= set(trace.transformed)
        owners = {id(self.modules[n]) for n in (self.targets if trace.failures else direct)}
        return [
            n
            for n, t in self.targets.items()
            if id(self.modules[n]) in owners
            and not compat.is_attention(self.modules[n])
            and (n in direct or (t.is_meta and self._is_parameter(n)))
        ]

    def _is_parameter(self, storage: str) -> bool:
        return storage.rpartition(".")[2] in self.modules[storage]._parameters

    def _check_filled(self, trace: Trace, aliases: Mapping[str, str]) -> frozenset[str]:
        """Every parameter in load form must be written whole.

        Returns:
            Those of which only the engine's loader knows what it fills.
        """
        filled: dict[str, list[Rect]] = defaultdict(list)
        for writes in trace.writes.values():
            for w in writes:
                filled[w.storage].append(w.target)
        shared = {aliases[n] for n in aliases}
        faults, loose = [], set()
        for name, tensor in self.targets.items():
            if not self._is_parameter(name) or not tensor.numel() or name in aliases:
                continue
            if compat.is_attention(self.modules[name]) or (name in shared and filled[name]):
                continue
            rects = {*filled[name], *(rect for rect, _ in trace.constants.get(name, ()))}
            missing = tensor.numel() - union_volume(rects)
            if missing and (trace.failures or name in trace.transformed):
                loose.add(name)
            elif missing:
                faults.append(
                    f"{name} (engine rank {self.rank}): expected {tensor.numel()} elements of shape "
                    f"{tuple(tensor.shape)}, found {missing} filled by no tensor of the trainer"
                )
        if faults:
            raise TensorMismatch("the trainer lacks tensors that the engine needs", faults)
        return frozenset(loose)

    def _spec(self, name: str, trace: Trace) -> StorageSpec:
        tensor = self.targets[name]
        constants = tuple(trace.constants.get(name, ()))
        return StorageSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype, constants)


def _written(trace: Trace, by_loader: set[str]) -> dict[str, list[Rect]]:
    """Return what of each storage the trainer writes by itself."""
    found: dict[str, list[Rect]] = defaultdict(list)
    for name, writes in trace.writes.items():
        if name not in by_loader and name.removesuffix("_scale_inv") not in by_loader:
            for write in writes:
                found[write.storage].append(write.target)
    return found


def _loaded(trace: Trace, misc: Sequence[str], loose: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """Return the misc tensors that the loader puts into each storage; of some, nobody knows where they go."""
    found: dict[str, list[str]] = defaultdict(list)
    reached = trace.reached()
    for name in misc:
        for storage in sorted(reached[name]):
            found[storage].append(name)
    lost = [name for name in misc if name in trace.failures]
    if lost:
        found |= dict.fromkeys(sorted(loose - found.keys()), lost)
    return {storage: tuple(names) for storage, names in found.items()}


def _misc_box(info: TensorInfo, recipe: Recipe) -> Box:
    at = Placement(MISC + info.name, 0, contiguous(info.shape))
    blockwise = info.encoding is Encoding.BLOCKWISE and not recipe.dequantize
    return Box(
        info.name, (0,) * len(info.shape), info.shape, at, misc_scales(info) if blockwise else None
    )


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
