"""Mappings that are no boxes: gathered by the bridge's own export, tensor by tensor, and nothing else is."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from fp8sync.plan.coverage import check_tiling
from fp8sync.recipe import Formula
from fp8sync.sources.megatron import MegatronSource
from fp8sync.sources.megatron.gathered import GATHERED
from tests.megatron import cpu
from tests.megatron.checks import (
    LINEAR,
    as_quantized,
    differences,
    exported,
    gather,
    load,
    reference,
    refused,
    same_tensors,
)
from tests.megatron.transfer import destination, transfer
from tests.megatron.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def own_mappings() -> dict[str, type]:
    """Someone's own mappings of attention and experts, and one that speaks on one rank alone."""
    from megatron.bridge.models.conversion import param_mapping

    class OwnQKV(param_mapping.QKVMapping):
        """It may do anything."""

    class OwnGated(param_mapping.GatedMLPMapping):
        """On ranks of expert parallelism it gives all ranks' experts."""

    class Quiet(param_mapping.ReplicatedMapping):
        """Gives its tensor to the first tensor-parallel rank alone."""

        def megatron_to_hf(self, weights: Any, module: Any) -> dict[str, torch.Tensor]:
            found = super().megatron_to_hf(weights, module)
            return {} if self.tp_rank else found

    return {
        "self_attention.linear_qkv.weight": OwnQKV,
        "experts.linear_fc1": OwnGated,
        "local_experts.*.linear_fc1.weight": OwnGated,
        "final_layernorm.weight": Quiet,
    }


def check_loose(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """A model with `own_mappings`."""
    with mapped_by(own_mappings()):
        return check_gathered(checkpoint, axes)


def check_loose_masters(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """The bridge exports parameters; who asked for masters is told."""
    with mapped_by(own_mappings()):
        bridge, chunks = load(checkpoint, axes)
        chunks, _ = cpu.with_optimizer(chunks, distributed=True)
        source = MegatronSource(chunks, bridge, master=True)
        source.prepare()
        said = "linear_qkv.weight: the bridge exports the parameter, not its master"
        return refused(said, source.manifest)


def check_gathered(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """All tensors arrive, and are exported; what is gathered is that alone, evenly kept, and named with its reason."""
    bridge, chunks = load(checkpoint, axes)
    source = MegatronSource(chunks, bridge)
    faults = refused("expected prepare() on every rank", source.manifest)
    with patch.object(bridge, "export_hf_weights", _watched(bridge.export_hf_weights, faults)):
        with Watch(p for chunk in chunks for p in chunk.parameters()) as watch:
            source.prepare()
        own = source.manifest()
        merged = gather(own)
        check_tiling(merged)
        live = source.storages()
        faults += _shares(merged, live)
        faults += refused("expected prepare() on every rank", source.storages)
        loose = {n for n, info in merged.tensors.items() if info.misc}
        weights = {p.numel() for chunk in chunks for p in chunk.parameters()}
        faults += [] if loose else ["nothing was gathered"]
        faults += [] if len(loose) < len(merged.tensors) else ["everything was gathered"]
        if dist.get_world_size() == axes.get("tp", 1) and not watch.collectives and weights:
            faults.append("no collective was seen")
        expected = reference(checkpoint)
        faults += same_tensors(merged, expected)
        faults += differences(transfer(merged, destination(merged, {}), live), expected)
        source.prepare()
        formulas = {n: Formula.POW2 for n in merged.tensors if LINEAR.search(n)}
        arrived = transfer(merged, destination(merged, formulas), source.storages())
    faults += differences(arrived, as_quantized(expected, formulas))
    return faults + differences(exported(source, checkpoint, "bf16"), expected)


def _shares(merged: Any, live: dict[str, torch.Tensor]) -> list[str]:
    """No rank keeps more than another by more than the largest tensor."""
    own = {n: t for n, t in live.items() if n.startswith(GATHERED)}
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, {n: t.nbytes for n, t in own.items()})
    sizes = [sum(given.values()) for given in told]
    largest = max(size for given in told for size in given.values())
    names = [n.removeprefix(GATHERED) for given in told for n in given]
    faults = [f"{sizes} bytes per rank"] if max(sizes) - min(sizes) > largest else []
    if sorted(names) != sorted(n for n, info in merged.tensors.items() if info.misc):
        faults.append(f"kept: {names}")
    return faults


def _watched(export: Any, faults: list[str]) -> Any:
    """The bridge's export; says if a tensor is kept by a rank that is not to read it."""

    def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
        given: list[tuple[str, Any]] = []
        for name, tensor in export(*args, **kwargs):
            given.append((name, weakref.ref(tensor)))
            yield name, tensor
            del tensor
        alive = [name for name, ref in given if ref() is not None]
        if len(alive) > 1 and len(alive) == len(given):
            faults.append(f"all of {alive} are kept")

    return watched


class mapped_by:
    """Let the registry's mappings of these parameters be of other classes."""

    def __init__(self, own: dict[str, type]) -> None:
        self._own = own

    def __enter__(self) -> None:
        from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry

        build = MegatronMappingRegistry.__init__

        def changed(registry: Any, *mappings: Any) -> None:
            build(registry, *(self._changed(mapping) for mapping in mappings))

        self._patch = patch.object(MegatronMappingRegistry, "__init__", changed)
        self._patch.start()

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def _changed(self, mapping: Any) -> Any:
        for part, cls in self._own.items():
            if part in mapping.megatron_param:
                names = mapping.hf_param
                given = names if isinstance(names, dict) else {"hf_param": names}
                return cls(mapping.megatron_param, **given)
        return mapping
