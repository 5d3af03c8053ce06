"""Do both sides hold the same tensors, in formats that fit?

Checked for all tensors before anything is planned; every fault is listed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fp8sync.errors import RecipeMismatch, TensorMismatch
from fp8sync.manifest import TensorInfo
from fp8sync.plan.boxes import misaligned_dim, span
from fp8sync.plan.spread import side_of
from fp8sync.recipe import BLOCK, Encoding, Formula

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from fp8sync.manifest import Manifest
    from fp8sync.plan.spread import Spread

__all__ = ["MISC", "agree_on_tensors", "cut_pairs"]

_FLOATS = ("bfloat16", "float16", "float32")
_SECOND_ROUNDING = "2.6 %"
_NAMED_RANKS = 8
MISC = "misc/"
"""Prefix of the storages that hold whole HF tensors for the engine's own loader."""


def agree_on_tensors(
    source: Mapping[str, TensorInfo],
    destination: Mapping[str, TensorInfo],
    spreads: Mapping[str, Spread],
    unsliced: Collection[str] = (),
    *,
    requantize: bool = False,
) -> dict[str, TensorInfo]:
    """Return the destination's tensors as they will be sent.

    A pair that is passed through keeps its own formula. A pair that the trainer's boxes cut inside a
    block is given a `misc` reason: it travels dequantized, and the engine quantizes the whole anew.

    Args:
        source: the trainer's tensors.
        destination: the engine's.
        spreads: where the trainer keeps them.
        unsliced: FP8 pairs of which the trainer's blocks are not the tensor's.
        requantize: whether pairs that do not fit keep the engine's format, and are converted.

    Raises:
        TensorMismatch: a tensor is missing on one side, shapes differ, or a dtype cannot become the
            engine's: only BF16, FP16 and FP32 are cast into each other, or quantized.
        RecipeMismatch: a pair that the engine would have to convert.
    """
    faults = []
    misfits = {}
    for name, info in destination.items():
        held = source.get(name)
        if held is None:
            faults.append(f"{name}: expected by the engine, found on no trainer rank")
        elif held.shape != info.shape:
            where = _where(name, spreads)
            faults.append(f"{where}: expected shape {info.shape}, found {held.shape}")
        elif not _castable(held, info):
            where = _where(name, spreads)
            faults.append(f"{where}: expected {_format(info)}, found dtype {held.dtype}")
        elif misfit := _misfit(held, info):
            misfits[name] = f"{_where(name, spreads)}: {misfit}"
    faults += [
        f"{_where(name, spreads)}: expected by no engine rank, found shape {info.shape}"
        for name, info in source.items()
        if name not in destination
    ]
    refused = [] if requantize else list(misfits.values())
    if faults:
        raise TensorMismatch("trainer and engine hold different tensors", faults + refused)
    if refused:
        summary = (
            "trainer and engine hold different formats; "
            "Recipe(on_format_mismatch='requantize') converts these FP8 pairs on the way"
        )
        raise RecipeMismatch(summary, refused)
    cut = _cut_pairs(source, spreads, unsliced)
    agreed = {}
    for name, info in destination.items():
        if info.unused:
            agreed[name] = info
        elif name in cut:
            reason = info.misc or cut[name]
            agreed[name] = TensorInfo(name, info.shape, "float32", misc=reason)
        elif source[name].encoding is Encoding.BLOCKWISE and name not in misfits:
            agreed[name] = replace(info, formula=source[name].formula)
        else:
            agreed[name] = info
    return agreed


def _castable(held: TensorInfo, wanted: TensorInfo) -> bool:
    if held.encoding is Encoding.BLOCKWISE:
        return True
    floats = held.dtype in _FLOATS
    if wanted.encoding is Encoding.BLOCKWISE:
        return floats
    return held.dtype == wanted.dtype or (floats and wanted.dtype in _FLOATS)


def _misfit(held: TensorInfo, wanted: TensorInfo) -> str:
    if held.encoding is Encoding.PLAIN:
        return ""
    if wanted.encoding is Encoding.PLAIN:
        return f"expected {_format(wanted)}, found {_format(held)}"
    if held.formula is Formula.FP32 and wanted.formula is Formula.POW2:
        return (
            f"expected {_format(wanted)}, found {_format(held)}; "
            "the engine's kernel would round every scale a second time, "
            f"quantizing anew adds {_SECOND_ROUNDING} (relative error, normal weights)"
        )
    return ""


def _where(name: str, spreads: Mapping[str, Spread]) -> str:
    held = spreads[name].ranks if name in spreads else ()
    ranks = sorted({rank for holders in held for rank in holders})
    if len(ranks) > _NAMED_RANKS:
        return f"{name} ({len(ranks)} trainer ranks from {ranks[0]} to {ranks[-1]})"
    return f"{name} (trainer rank {', '.join(map(str, ranks)) or 'none'})"


def _format(info: TensorInfo) -> str:
    if info.encoding is Encoding.PLAIN:
        return info.dtype
    return f"an FP8 pair with {info.formula.value if info.formula else 'unknown'} scales"


def cut_pairs(source: Manifest) -> dict[str, str]:
    """Return, by tensor, why an FP8 pair of the trainer cannot be passed through.

    Either a box cuts one of its blocks, or a box has blocks of its own.
    """
    side = side_of(source)
    return _cut_pairs(side.tensors, side.spreads, side.unsliced)


def _cut_pairs(
    source: Mapping[str, TensorInfo], spreads: Mapping[str, Spread], unsliced: Collection[str]
) -> dict[str, str]:
    reasons: dict[str, str] = {}
    known: dict[Spread, str] = {}
    for name, info in source.items():
        if info.encoding is not Encoding.BLOCKWISE or name not in spreads:
            continue
        spread = spreads[name]
        if spread not in known:
            known[spread] = _cut(spread, info.shape)
        if known[spread]:
            reasons[name] = known[spread]
        elif name in unsliced:
            reasons[name] = (
                "the trainer's blocks are not the tensor's; the values are quantized anew"
            )
    return reasons


def _cut(spread: Spread, shape: tuple[int, ...]) -> str:
    for rect, ranks in zip(spread.rects, spread.ranks, strict=True):
        dim = misaligned_dim(rect, shape)
        if dim is not None:
            return (
                f"trainer rank {ranks[0]} holds {span(rect)} of an FP8 pair, which cuts a "
                f"{BLOCK}-block in dim {dim}; the values are quantized anew"
            )
    return ""
