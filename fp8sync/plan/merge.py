"""The ranks of one side, as one manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import Box, Manifest, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["merge_ranks"]


def merge_ranks(manifests: Iterable[Manifest]) -> Manifest:
    """Return one manifest of all ranks; a rank that has no box of a tensor has no say in its format.

    Raises:
        UnsupportedLayout: two ranks hold, or want, one tensor in different formats.
    """
    tensors: dict[str, TensorInfo] = {}
    ranks: dict[int, tuple[Box, ...]] = {}
    settled: dict[str, int] = {}
    faults = []
    for manifest in manifests:
        ranks.update(manifest.ranks)
        owner = {box.tensor: rank for rank, boxes in manifest.ranks.items() for box in boxes}
        for name, info in manifest.tensors.items():
            known = tensors.setdefault(name, info)
            if name not in owner:
                if known.unused and not info.unused and name not in settled:
                    tensors[name] = info  # left out only if all ranks say so
                continue
            if name not in settled:
                settled[name] = owner[name]
                tensors[name] = info
            elif known != info:
                faults.append(
                    f"{name}: rank {settled[name]} has {_format(known)}, "
                    f"rank {owner[name]} has {_format(info)}"
                )
    if faults:
        raise UnsupportedLayout("ranks of one side disagree on a tensor", faults)
    return Manifest.of(tensors.values(), ranks)


def _format(info: TensorInfo) -> str:
    formula = f" {info.formula.value}" if info.formula else ""
    misc = f", misc ({info.misc})" if info.misc else ""
    return f"{info.shape} {info.dtype} {info.encoding.value}{formula}{misc}"
