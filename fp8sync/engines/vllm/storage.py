"""What a worker stages: the form of every storage, and which of them the engine's own loader fills."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from fp8sync.manifest import Placement
from fp8sync.plan.boxes import block_shape, touched_blocks
from fp8sync.plan.coverage import remainder
from fp8sync.plan.formats import MISC
from fp8sync.recipe import Encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8sync.manifest import Box, Manifest, TensorInfo
    from fp8sync.plan import Plan
    from fp8sync.plan.boxes import Rect
    from fp8sync.recipe import Formula

__all__ = [
    "MISC",
    "EngineLayout",
    "StorageSpec",
    "contiguous",
    "misc_scales",
    "misc_specs",
    "module_of",
    "scale_specs",
]


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
            part = tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
            if tensor.dtype == torch.float8_e4m3fn and math.isnan(value):
                part.view(torch.uint8).fill_(0x7F)  # not every device fills codes
            else:
                part.fill_(value)
        return tensor

    def poisoned(self, written: Iterable[Rect]) -> StorageSpec:
        """Return the spec with NaN wherever no constant is and the trainer writes nothing.

        What stays NaN was not loaded. Nothing is put where the trainer writes: it may do so first.
        """
        whole = (0,) * len(self.size), self.size
        nans = ((rect, math.nan) for rect in remainder(whole, written))
        return replace(self, constants=(*nans, *self.constants))


@dataclass(frozen=True)
class EngineLayout:
    """What a worker wants and how it stages it.

    Args:
        manifest: this worker's boxes.
        storages: form of every staged storage, by name.
        aliases: parameters shared by several modules (tied weights): name -> first name.
        processed: modules that vLLM has to process in any case: its loader puts misc tensors into
            them, or it derives other weights from them.
        open: storages of which only the engine's loader knows what it fills; what the trainer does
            not write there is staged as NaN, and none may be left when the loader is done.
        kv_scales: attention modules that are sent KV-cache scales.
        quantize: tensors that arrive whole and unquantized for FP8 parameters, with their formula.
        by_loader: the tensors that the engine's loader puts into a storage, or may put there, if any.
    """

    manifest: Manifest
    storages: Mapping[str, StorageSpec]
    aliases: Mapping[str, str] = field(default_factory=dict)
    processed: frozenset[str] = frozenset()
    open: frozenset[str] = frozenset()
    kv_scales: frozenset[str] = frozenset()
    quantize: Mapping[str, Formula] = field(default_factory=dict)
    by_loader: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """This worker's rank among the engines' workers."""
        (rank,) = self.manifest.ranks
        return rank

    def only(self, storages: Iterable[str]) -> EngineLayout:
        """Return the layout of some storages; what is loaded, KV-cache scales too, comes with the misc path."""
        held = dict.fromkeys(storages)
        misc = any(name.startswith(MISC) for name in held)
        return replace(
            self,
            storages={name: self.storages[name] for name in held},
            aliases={a: name for a, name in self.aliases.items() if name in held},
            open=self.open & held.keys(),
            kv_scales=self.kv_scales if misc else frozenset(),
            by_loader=self.by_loader if misc else {},
        )

    def with_misc_of(self, plan: Plan) -> EngineLayout:
        """Return the layout with what the plan sends to the misc path, where the trace has it otherwise."""
        found = {n: i for n, i in plan.tensors.items() if i.misc and not self._stages(i)}
        boxes = [b for held in self.manifest.ranks.values() for b in held if b.tensor in found]
        own = {box.tensor: box.scale_at is not None for box in boxes}
        quantize = {}
        for name in own:
            wanted = self.manifest.tensors[name]
            sent_as = found[name].encoding
            if wanted.dtype == "float8_e4m3fn" and wanted.formula and sent_as is Encoding.PLAIN:
                quantize[name] = wanted.formula
        specs: dict[str, StorageSpec] = {}
        for name, scaled in own.items():
            specs |= misc_specs([found[name]], scales=scaled)
        unscaled = {misc_scales(found[name]).storage for name in quantize}
        by_loader = {name: list(tensors) for name, tensors in self.by_loader.items()}
        for box in boxes:
            if not box.at.storage.startswith(MISC):
                by_loader.setdefault(box.at.storage, []).append(box.tensor)
        return replace(
            self,
            storages={**{n: s for n, s in self.storages.items() if n not in unscaled}, **specs},
            processed=self.processed | {module_of(storage) for storage in by_loader},
            quantize={**self.quantize, **quantize},
            by_loader={n: tuple(dict.fromkeys(tensors)) for n, tensors in by_loader.items()},
        )

    def _stages(self, info: TensorInfo) -> bool:
        """Whether the trace put a tensor on the misc path, in the form in which the plan sends it."""
        wanted = self.manifest.tensors[info.name]
        alike = (wanted.dtype, wanted.encoding) == (info.dtype, info.encoding)
        return alike and MISC + info.name in self.storages


def misc_specs(infos: Iterable[TensorInfo], *, scales: bool) -> dict[str, StorageSpec]:
    """Return the storages of whole tensors; with `scales`, of blockwise tensors' scale_inv too."""
    specs = {}
    for info in infos:
        dtype = getattr(torch, info.dtype)
        specs[MISC + info.name] = StorageSpec(info.shape, contiguous(info.shape), dtype)
        if scales and info.encoding is Encoding.BLOCKWISE:
            specs |= scale_specs([info])
    return specs


def scale_specs(
    infos: Iterable[TensorInfo], boxes: Sequence[Box] | None = None
) -> dict[str, StorageSpec]:
    """Return the storages of whole scale_inv; with `boxes`, NaN where none of them has a block."""
    sent: dict[str, list[Rect]] = defaultdict(list)
    for box in boxes or ():
        sent[box.tensor].append(touched_blocks((box.start, box.shape)))
    specs = {}
    for info in infos:
        shape = block_shape(info.shape)
        spec = StorageSpec(shape, contiguous(shape), torch.float32)
        specs[misc_scales(info).storage] = spec if boxes is None else spec.poisoned(sent[info.name])
    return specs


def misc_scales(info: TensorInfo) -> Placement:
    """Return where the whole scale_inv of a tensor lies for the engine's own loader."""
    strides = contiguous(block_shape(info.shape))
    return Placement(f"{MISC}{info.name}_scale_inv", 0, strides)


def module_of(storage: str) -> str:
    """Return the name of the module that owns a parameter or buffer."""
    return storage.rpartition(".")[0]


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Return row-major strides, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
