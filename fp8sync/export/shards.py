"""Safetensors files that are written piece by piece: their headers are known before their data.

Format: 8 bytes little-endian length, a JSON header padded with spaces to a multiple of 8, the data.
As the library does, tensors with wider elements come first, so that each is aligned.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch

from fp8sync.manifest import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import BinaryIO

__all__ = ["Entries", "ShardFiles", "nbytes"]

Entries = dict[str, tuple[str, tuple[int, ...]]]
"""(dtype, shape) by name."""

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def nbytes(entries: Entries) -> int:
    """Bytes of the data."""
    return sum(math.prod(shape) * ITEMSIZE[dtype] for dtype, shape in entries.values())


class ShardFiles:
    """The files of a checkpoint, each of at most `shard_bytes` unless one tensor is larger.

    Args:
        folder: where they go; it exists.
        tensors: entries by tensor (a weight, or a weight and its scales), which stay together.
        shard_bytes: of data in one file.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Entries], shard_bytes: int) -> None:
        self._folder = folder
        shards = _divide(tensors.values(), shard_bytes)
        names = [_name(number, len(shards)) for number in range(len(shards))]
        self.weight_map = {n: f for f, shard in zip(names, shards, strict=True) for n in shard}
        self.total_bytes = sum(nbytes(shard) for shard in shards)
        self._shards = dict(zip(names, shards, strict=True))
        self.names = names
        self._written: dict[str, int] = {}
        self._offsets: dict[str, int] = {}
        self._file: BinaryIO | None = None
        self._open = ""

    def append(self, name: str, part: torch.Tensor) -> None:
        """Write the next part of a tensor's elements, in row-major order."""
        file = self._file_of(name)
        data = part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        done = self._written.get(name, 0)
        file.seek(self._offsets[name] + done)
        file.write(data)
        self._written[name] = done + data.nbytes

    def close(self) -> None:
        """Close the files.

        Raises:
            ValueError: a tensor is not complete.
        """
        if self._file is not None:
            self._file.close()
        expected = {n: nbytes({n: e}) for shard in self._shards.values() for n, e in shard.items()}
        for name, size in expected.items():
            if self._written.get(name, 0) != size:
                found = self._written.get(name, 0)
                raise ValueError(f"{name}: expected {size} bytes, {found} were written")

    def remove(self) -> None:
        """Close the files and delete what was written."""
        if self._file is not None:
            self._file.close()
        for name in self._shards:
            (self._folder / name).unlink(missing_ok=True)

    def _file_of(self, name: str) -> BinaryIO:
        wanted = self.weight_map[name]
        if self._file is not None and wanted == self._open:
            return self._file
        if self._file is not None:
            self._file.close()
        path = self._folder / wanted
        known = path.exists()
        self._file, self._open = path.open("r+b" if known else "w+b"), wanted
        if not known:
            header, offsets = _header(self._shards[wanted])
            self._file.write(header)
            self._file.truncate(len(header) + nbytes(self._shards[wanted]))
            self._offsets |= {n: len(header) + at for n, at in offsets.items()}
        return self._file


def _divide(tensors: Iterable[Entries], shard_bytes: int) -> list[Entries]:
    shards: list[Entries] = [{}]
    for entries in tensors:
        if shards[-1] and nbytes(shards[-1]) + nbytes(entries) > shard_bytes:
            shards.append({})
        shards[-1].update(entries)
    return shards


def _header(entries: Entries) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the data, and where in the data each tensor begins."""
    told: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    at = 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda e: -ITEMSIZE[e[1][0]]):
        end = at + nbytes({name: (dtype, shape)})
        told[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        offsets[name], at = at, end
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _name(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
