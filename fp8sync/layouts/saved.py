"""A manifest from a file, checked: it may have been edited, cut short, or be something else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fp8sync.manifest import ITEMSIZE, Manifest
from fp8sync.plan.boxes import span
from fp8sync.recipe import Encoding, Formula

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["saved_manifest"]

_ENCODINGS = tuple(e.value for e in Encoding)
_FORMULAS = (None, *(f.value for f in Formula))
_LARGEST = 2**63 - 1


def saved_manifest(path: Path) -> Manifest:
    """Read what `Manifest.to_json` gave.

    Args:
        path: a file of JSON.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no manifest; every fault is listed, with tensor and rank.
    """
    text = f"{path}: expected a saved manifest (Manifest.to_json), found"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{text} what is not JSON: {error}") from error
    if not isinstance(data, dict) or not {"tensors", "ranks"} <= data.keys():
        what = f"an object of {sorted(data)}" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{text} {what}")
    faults = list(_faults(data["tensors"], data["ranks"]))
    if len(faults) == 1:
        raise ValueError(f"{text} {faults[0]}")
    if faults:
        raise ValueError("\n  - ".join((f"{text} {len(faults)} faults", *faults)))
    return Manifest.from_json(data)


def _faults(tensors: Any, ranks: Any) -> Iterator[str]:
    if not isinstance(tensors, list):
        yield f"no list of tensors: {_short(tensors)}"
        return
    shapes: dict[str, Any] = {}
    for row in tensors:
        yield from _tensor_faults(row, shapes)
    if not isinstance(ranks, dict) or not ranks:
        yield f"no ranks: {_short(ranks)}"
        return
    for rank, boxes in ranks.items():
        if not rank.isdecimal() or str(int(rank)) != rank:
            yield f"a rank that is no number: {_short(rank)}"
        elif not isinstance(boxes, list):
            yield f"no list of boxes of rank {rank}: {_short(boxes)}"
        else:
            for box in boxes:
                yield from _box_faults(rank, box, shapes)


def _tensor_faults(row: Any, shapes: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a tensor; its shape is noted, None where it is none."""
    if not isinstance(row, list) or len(row) not in {6, 7} or not isinstance(row[0], str):
        yield f"a tensor that is no [name, shape, dtype, encoding, formula, misc]: {_short(row)}"
        if isinstance(row, list) and row and isinstance(row[0], str):
            shapes[row[0]] = None
        return
    name, shape, dtype, encoding, formula, *reasons = row
    if name in shapes:
        yield f"two tensors of one name: {name}"
    sized = _counts(shape, 2 if encoding == Encoding.BLOCKWISE.value else None)
    shapes[name] = shape if sized else None
    checks = {
        ("shape", "a list of sizes, two if blockwise", _short(shape)): sized,
        ("dtype", f"one of {', '.join(ITEMSIZE)}", _short(dtype)): dtype in tuple(ITEMSIZE),
        ("encoding", f"one of {', '.join(_ENCODINGS)}", _short(encoding)): encoding in _ENCODINGS,
        ("formula", "pow2, fp32 or null", _short(formula)): formula in _FORMULAS,
        ("misc and unused", "text", _short(reasons)): all(isinstance(r, str) for r in reasons),
    }
    for (what, expected, found), right in checks.items():
        if not right:
            yield f"{name}: expected as {what} {expected}, found {found}"


def _box_faults(rank: str, box: Any, shapes: dict[str, Any]) -> Iterator[str]:
    if not isinstance(box, list) or len(box) not in {5, 6} or not isinstance(box[0], str):
        yield f"a box of rank {rank} that is no [tensor, start, shape, at, scale_at]: {_short(box)}"
        return
    name, start, shape, at, scale_at, *origin = box
    if name not in shapes:
        yield f"a box of rank {rank} of no tensor listed: {name}"
    if shapes.get(name) is None:
        return
    whole = shapes[name]
    dims = len(whole)
    where = f"{name} (rank {rank})"
    if not _counts(start, dims) or not _counts(shape, dims):
        found = f"{_short(start)} and {_short(shape)}"
        yield f"{where}: expected start and shape of {dims} dims, found {found}"
    elif any(a + n > size for a, n, size in zip(start, shape, whole, strict=True)):
        yield f"{where}: expected a box within {tuple(whole)}, found {span((start, shape))}"
    for what, place in {"at": at, "scale_at": scale_at}.items():
        if not _is_placement(place, dims) and (what == "at" or place is not None):
            expected = f"[storage, offset, [{dims} strides]]"
            yield f"{where}: expected as {what} {expected}, found {_short(place)}"
    if origin and not _counts(origin[0], dims):
        yield f"{where}: expected a scale_origin of {dims} dims, found {_short(origin[0])}"


def _is_placement(value: Any, dims: int) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    return isinstance(value[0], str) and _counts([value[1]]) and _counts(value[2], dims)


def _counts(value: Any, length: int | None = None) -> bool:
    """Whether a value is a list of integers from 0 on, as many as asked; true and false are none."""
    if not isinstance(value, list) or length not in {None, len(value)}:
        return False
    return all(type(n) is int and 0 <= n <= _LARGEST for n in value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
