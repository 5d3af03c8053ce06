"""The ranks of one side, as one manifest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import Box, Manifest, TensorInfo
from fp8sync.plan.formats import MISC

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["merge_ranks", "merged", "taken_whole", "with_misc"]


def merge_ranks(manifests: Iterable[Manifest]) -> Manifest:
    """Return one manifest of all ranks; a rank that has no box of a tensor has no say in its format.

    What one rank has to take whole (`misc`) all do, for the first such rank's reason. Boxes stay as they
    are: it is the plan that replaces those of ranks that had it on the bulk path.

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
            elif (joint := merged(known, info)) is not None:
                tensors[name] = joint
            else:
                faults.append(
                    f"{name}: rank {settled[name]} has {_format(known)}, "
                    f"rank {owner[name]} has {_format(info)}"
                )
    if faults:
        raise UnsupportedLayout("ranks of one side disagree on a tensor", faults)
    return Manifest.of(tensors.values(), ranks)


def merged(one: TensorInfo, other: TensorInfo) -> TensorInfo | None:
    """Return a tensor as two ranks, or two engines, can both take it; None where formats differ.

    Examples:
        >>> bulk = TensorInfo("w", (192,), "bfloat16")
        >>> merged(bulk, TensorInfo("w", (192,), "bfloat16", misc="a transform")).misc
        'a transform'
        >>> merged(bulk, TensorInfo("w", (192,), "float32"))
    """
    if one == other:
        return one
    joint = replace(one, misc=one.misc or other.misc)
    return joint if joint == replace(other, misc=joint.misc) else None


def taken_whole(manifest: Manifest, rank: int) -> dict[str, str]:
    """Return what an engine's rank takes whole because another one has to, with that one's reason.

    Args:
        manifest: of all ranks, merged.
        rank: the one to look at.
    """
    infos = manifest.tensors
    return {
        box.tensor: infos[box.tensor].misc
        for box in manifest.ranks.get(rank, ())
        if infos[box.tensor].misc and not box.at.storage.startswith(MISC)
    }


def with_misc(manifest: Manifest, reasons: Mapping[str, str]) -> Manifest:
    """Return a rank's manifest with what `taken_whole` found for it."""
    told = {n: replace(manifest.tensors[n], misc=reason) for n, reason in reasons.items()}
    return replace(manifest, tensors={**manifest.tensors, **told})


def _format(info: TensorInfo) -> str:
    formula = f" {info.formula.value}" if info.formula else ""
    misc = f", misc ({info.misc})" if info.misc else ""
    return f"{info.shape} {info.dtype} {info.encoding.value}{formula}{misc}"
