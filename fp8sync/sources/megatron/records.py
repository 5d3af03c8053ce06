"""The tensors of a `torch.distributed.checkpoint` directory, mapped into memory where they lie.

Each part of a tensor is a `torch.save` record within a file: an uncompressed ZIP archive with the
elements in `data/0`, and their shape and strides in `data.pkl`. That is read as text, not unpickled. The
directory's own index, `.metadata`, is a pickle and is read by torch: trust where it comes from.
"""

from __future__ import annotations

import mmap
import pickletools
import zipfile
from io import RawIOBase
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fp8sync.errors import UnsupportedLayout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Record", "Records"]

_LOCAL_HEADER = 30
"""Bytes of a ZIP member's header before its name; lengths of name and extra field at 26 and 28."""


class Record(NamedTuple):
    """A part of a tensor: where it begins in the whole, and its elements."""

    start: tuple[int, ...]
    tensor: torch.Tensor


class Records:
    """Tensors by key.

    Args:
        folder: with `.metadata` and `*.distcp` files.

    Raises:
        UnsupportedLayout: it is no such directory, or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self._folder = folder
        self._files: dict[str, mmap.mmap] = {}
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:
            raise UnsupportedLayout(f"{folder / '.metadata'} cannot be read: {error!r}") from error
        told = metadata.state_dict_metadata.items()
        self._told = {n: t for n, t in told if isinstance(t, TensorStorageMetadata)}
        self._places: dict[tuple[str, tuple[int, ...]], Any] = {
            (index.fqn, tuple(index.offset)): place
            for index, place in metadata.storage_data.items()
            if index.offset is not None
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors."""
        return {name: tuple(told.size) for name, told in self._told.items()}

    def parts(self, name: str) -> Iterator[Record]:
        """Yield the parts of a tensor; nothing is read but their headers."""
        told = self._told[name]
        for chunk in told.chunks:
            start = tuple(chunk.offsets)
            place = self._places[name, start]
            if getattr(place, "transform_descriptors", None):
                raise UnsupportedLayout(f"{name}: written through {place.transform_descriptors}")
            try:
                tensor = self._mapped(place, told.properties.dtype, tuple(chunk.sizes))
            except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
                raise UnsupportedLayout(f"{name} at {list(start)}: {error}") from error
            yield Record(start, tensor)

    def _mapped(self, place: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        path = place.relative_path
        if path not in self._files:
            with (self._folder / path).open("rb") as file:
                self._files[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = self._files[path]
        with zipfile.ZipFile(_Part(data, place.offset, place.length)) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            member = archive.getinfo(names["data/0"])
            layout = list(_layout(archive.read(names["data.pkl"])))
        header = place.offset + member.header_offset
        name, extra = (
            int.from_bytes(data[header + at : header + at + 2], "little") for at in (26, 28)
        )
        begin = header + _LOCAL_HEADER + name + extra
        offset, size, strides = layout[0], layout[1 : 1 + len(shape)], layout[1 + len(shape) :]
        if tuple(size) != shape or len(strides) != len(shape) or member.compress_type:
            raise ValueError(f"expected a tensor {list(shape)}, found {layout[1:]}")
        count = member.file_size // dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
        return flat.as_strided(shape, strides, offset)


def _layout(pickled: bytes) -> Iterator[int]:
    """Yield the arguments of `torch._utils._rebuild_tensor_v2` after the storage: offset, size, strides."""
    ops = pickletools.genops(pickled)
    for _ in takewhile(lambda op: op[0].name != "BINPERSID", ops):
        pass
    for op, value, _ in takewhile(lambda op: op[0].name not in ("NEWFALSE", "NEWTRUE"), ops):
        if value is not None and op.name.startswith(("BININT", "LONG")):  # BINPUT numbers memos
            yield int(value)


class _Part(RawIOBase):
    """Bytes of a mapped file from one place on, as a file of their own."""

    def __init__(self, data: mmap.mmap, offset: int, length: int) -> None:
        self._data, self._offset, self._length, self._at = data, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, self._length)[whence] + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._length if size is None or size < 0 else min(self._at + size, self._length)
        found = self._data[self._offset + self._at : self._offset + end]
        self._at = end
        return found
