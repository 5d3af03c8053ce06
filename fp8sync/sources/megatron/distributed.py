"""A Megatron distributed checkpoint (`torch_dist`) as a `Source`, without a model.

A checkpoint holds whole tensors in parts, as some layout of ranks wrote them, whatever that layout was. It
is read as a model on one rank would be, whose parameters are in those parts.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan.boxes import overlap
from fp8sync.sources.megatron.mappings import Site, layout_of, why_no_boxes
from fp8sync.sources.megatron.pieces import whole
from fp8sync.sources.megatron.records import Records
from fp8sync.sources.megatron.recurrent import (
    is_centred,
    moved_rows,
    moves_rows,
    parts_of,
    uncentred,
)
from fp8sync.sources.megatron.tasks import VOCABULARIES, hook_faults, vocabulary_of
from fp8sync.trainers import rank_and_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from fp8sync.sources.megatron.pieces import Layout
    from fp8sync.sources.megatron.records import Record

__all__ = ["DistributedCheckpointSource", "holds_distributed_checkpoint"]

_NO_WEIGHTS = re.compile(
    r"(^|\.)optimizer\.|^(rng_state|rerun_state|opt_param_scheduler)|_extra_state"
)
_LAYERS = re.compile(r"(?<=\.layers\.)(?=[^\d])")
_EXPERTS = re.compile(r"(?<=\.experts)\.experts\.(?P<linear>linear_fc[12])\.(?P<kind>weight|bias)$")
_FUSED_NORM = "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
"""Layers without Transformer Engine write a norm of their own as if it were fused."""
_LOAD = "load the checkpoint into the model and export that"
_ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


class _Parameter(NamedTuple):
    """A parameter of the model, and where a checkpoint's tensor holds it: an index of its first dims."""

    name: str
    at: tuple[int, ...]


def holds_distributed_checkpoint(folder: str | Path) -> bool:
    """Whether a directory is a distributed checkpoint."""
    return (Path(folder) / ".metadata").exists()


class DistributedCheckpointSource:
    """The model weights of a distributed checkpoint, under Hugging Face names, mapped and read as needed.

    Args:
        folder: of one iteration, with `.metadata`.
        bridge: the `megatron.bridge.AutoBridge` of the model; one made from a config will do.
        rank: this trainer rank; where several ranks read one directory, they share the sending. None:
            that of torch.distributed's default group.

    Raises:
        UnsupportedLayout: files that are missing or unreadable.

    Examples:
        >>> source = DistributedCheckpointSource("run/iter_0000100", bridge)  # doctest: +SKIP
        >>> export_checkpoint(source, "step-100")  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, bridge: Any, rank: int | None = None) -> None:
        self.folder, self._bridge = Path(folder), bridge
        self._rank = rank_and_size()[0] if rank is None else rank
        self._registry = bridge._model_bridge.mapping_registry()
        self._model = bridge.to_megatron_provider(load_weights=False)
        groups = dict.fromkeys(("pp", "ep", "tp", "expt_tp"), _ALONE)
        self._registry.set_process_groups_from_pg_collection(SimpleNamespace(**groups))
        records = Records(self.folder)
        self._shapes = {n: s for n, s in records.shapes.items() if not _NO_WEIGHTS.search(n)}
        self._parts: dict[str, list[Record]] = {n: list(records.parts(n)) for n in self._shapes}
        for name, parts in list(parts_of(self._shapes)):
            self._join(name, parts)
        for name, shape in self._shapes.items():
            mapping = self._mapping(next(_parameters(name, shape)).name)
            if is_centred(mapping):
                found = self._parts[name]
                self._parts[name] = [
                    part._replace(tensor=uncentred(mapping, part.tensor)) for part in found
                ]

    @classmethod
    def of(cls, folder: str | Path, config: str | Path) -> DistributedCheckpointSource:
        """Read a checkpoint of the model whose `config.json` is in the directory `config`.

        Raises:
            UnsupportedLayout: no Megatron-Bridge, or none of its bridges knows such a model.
        """
        try:
            from megatron.bridge import AutoBridge
        except ImportError as error:
            raise UnsupportedLayout(
                f"reading a distributed checkpoint needs Megatron-Core and Megatron-Bridge: {error}"
            ) from error
        from transformers import AutoConfig

        try:
            bridge = AutoBridge.from_hf_config(AutoConfig.from_pretrained(str(config)))
        except (ValueError, OSError) as error:
            raise UnsupportedLayout(
                f"Megatron-Bridge knows no model of {config}: {error}"
            ) from error
        return cls(folder, bridge)

    @property
    def config(self) -> Any:
        """The Hugging Face config that the bridge was made from."""
        return getattr(self._bridge.hf_pretrained, "config", self._bridge.hf_pretrained)

    def storages(self) -> dict[str, torch.Tensor]:
        """Return the mapped parts; pages are read from the files when they are needed."""
        return {_named(n, part): part.tensor for n, parts in self._parts.items() for part in parts}

    def manifest(self) -> Manifest:
        """Return the boxes of all parts.

        Raises:
            UnsupportedLayout: tensors that no mapping speaks of, or that are no boxes, and layers that
                are missing; all of them at once.
        """
        infos: list[TensorInfo] = []
        boxes: list[Box] = []
        faults = [*hook_faults(self._bridge._model_bridge)]
        layers: set[int] = set()
        for key, shape in self._shapes.items():
            for parameter in _parameters(key, shape):
                layers |= {int(n) for n in re.findall(r"^decoder\.layers\.(\d+)\.", parameter.name)}
                try:
                    layout = self._layout(parameter, shape[len(parameter.at) :])
                except ValueError as error:
                    faults.append(f"{parameter.name}: {error}")
                    continue
                for name, full in layout.shapes.items():
                    dtype = str(self._parts[key][0].tensor.dtype).removeprefix("torch.")
                    infos.append(TensorInfo(name, full, dtype))
                boxes += self._boxes(key, parameter.at, layout)
        missing = sorted(set(range(self._model.num_layers)) - layers)
        faults += [
            f"decoder.layers.{n}: expected in the checkpoint, found nothing" for n in missing
        ]
        if faults:
            raise UnsupportedLayout(f"{self.folder} cannot be read as it is", faults)
        return Manifest.of(infos, {self._rank: boxes})

    def _join(self, joined: str, parts: list[str]) -> None:
        """Let a parameter that was saved in parts have their records, one below the other."""
        dim = 1 if _LAYERS.search(joined) else 0
        rows, records = 0, []
        for name in parts:
            shape = self._shapes.pop(name)
            for record in self._parts.pop(name):
                start = [*record.start]
                start[dim] += rows
                records.append(record._replace(start=tuple(start)))
            rows += shape[dim]
        self._parts[joined] = records
        self._shapes[joined] = (*shape[:dim], rows, *shape[dim + 1 :])

    def _mapping(self, parameter: str) -> Any:
        names = parameter, parameter.replace(*_FUSED_NORM)
        found = (self._registry.megatron_to_hf_lookup(name) for name in names)
        return next((mapping for mapping in found if mapping is not None), None)

    def _layout(self, parameter: _Parameter, shape: tuple[int, ...]) -> Layout:
        mapping = self._mapping(parameter.name)
        if mapping is None:
            kind = type(self._bridge._model_bridge).__name__
            raise ValueError(f"expected a mapping of {kind}, found none")
        if moves_rows(mapping):
            return moved_rows(mapping, self._model, shape)
        if is_centred(mapping):
            return whole(mapping.hf_param, shape)
        if reason := why_no_boxes(mapping):
            raise ValueError(f"{reason}; {_LOAD}")
        is_vocabulary = parameter.name.endswith(VOCABULARIES)
        rows = vocabulary_of(self._bridge) if is_vocabulary else None
        # On one rank it makes no difference how a module is divided; this class the bridge knows.
        module = type("ColumnParallelLinear", (), {"config": self._model})()
        return layout_of(Site(mapping, module, mapping.hf_param, shape, None, rows))

    def _boxes(self, key: str, index: tuple[int, ...], layout: Layout) -> Iterator[Box]:
        ones = (1,) * len(index)
        for part in self._parts[key]:
            size = tuple(part.tensor.shape)
            at = Placement(_named(key, part), 0, part.tensor.stride())
            for piece in layout.pieces:
                held = (*index, *piece.local), (*ones, *piece.shape)
                common = overlap(held, (part.start, size))
                if common is None:
                    continue
                begin, shape = common
                placed = at.at([i - first for i, first in zip(begin, part.start, strict=True)])
                moved = zip(piece.start, begin[len(index) :], piece.local, strict=True)
                start = tuple(first + i - local for first, i, local in moved)
                inner = Placement(placed.storage, placed.offset, placed.strides[len(index) :])
                yield Box(piece.tensor, start, shape[len(index) :], inner)


def _named(key: str, part: Record) -> str:
    return f"{key}/{','.join(str(i) for i in part.start)}"


def _parameters(key: str, shape: tuple[int, ...]) -> Iterator[_Parameter]:
    """Yield the parameters of a checkpoint's tensor: layers, and their experts, may be stacked."""
    stacked = _LAYERS.search(key)
    names = [_Parameter(key, ())]
    if stacked:
        names = [
            _Parameter(f"{key[: stacked.start()]}{n}.{key[stacked.start() :]}", (n,))
            for n in range(shape[0])
        ]
    for name, index in names:
        if not _EXPERTS.search(name):
            yield _Parameter(name, index)
            continue
        for n in range(shape[len(index)]):
            alone = _EXPERTS.sub(rf".local_experts.{n}.\g<linear>.\g<kind>", name)
            yield _Parameter(alone, (*index, n))
