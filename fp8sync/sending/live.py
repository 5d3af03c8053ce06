"""A descriptor table over live weights: built anew only when one of the storages that it reads has changed.

Each launch looks at its own storages just before it, so that the GPU works while the next launch's are looked
at: a trainer may have as many storages as tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8sync.errors import Fp8SyncError
from fp8sync.sending.alike import read_by
from fp8sync.sending.look import Look
from fp8sync.transport.memory import reader_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from fp8sync.plan import Copy
    from fp8sync.sending.alike import Alike
    from fp8sync.wire.payload import Storages
    from fp8sync_kernels import Table

    Build = Callable[[Callable[[str], tuple[int, str]]], Table]

__all__ = ["LiveTable"]


class LiveTable:
    """The table of one launch.

    Args:
        copies: that it reads for.
        build: returns the table, given what finds address and dtype of a storage.
        device: that launches, and can read the storages (`reader_of`).
        alike: how the storages have to lie, wherever they are.
    """

    def __init__(
        self, copies: Iterable[Copy], build: Build, device: torch.device, alike: Alike
    ) -> None:
        self._names = read_by(copies)
        self._build, self._device, self._alike = build, device, alike
        self._look: Look | None = None
        self._table: Table | None = None

    def at(self, storages: Storages) -> Table:
        """Return the table for the storages as they lie now.

        Raises:
            UnsupportedLayout: see `fp8sync.wire.tables.unwritable`.
            Fp8SyncError: they lie where they cannot be read from.
            TensorMismatch: they lie otherwise than when they were first looked at, or were freed.
        """
        if self._table is None or self._look is None or not self._look.holds(storages):
            look = Look(storages, self._names)
            self._alike.check(storages, self._names)
            for name in self._names:
                found_on = reader_of({name: storages[name]})
                if found_on != self._device and storages[name].numel():
                    raise Fp8SyncError(
                        f"{name}: expected weights that {self._device} reads, as when the link was made, "
                        f"found them on {storages[name].device}"
                    )
            found = {name: _found(storages[name]) for name in self._names}
            self._table = self._build(found.__getitem__)
            self._look = look
        return self._table


def _found(storage: torch.Tensor) -> tuple[int, str]:
    return storage.data_ptr(), str(storage.dtype).removeprefix("torch.")
