"""A source as a link reads it: prepared on every rank at once, then read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8sync.errors import Fp8SyncError
from fp8sync.plan.coverage import check_all_held, check_tiling

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8sync.manifest import Manifest
    from fp8sync.sources import Source
    from fp8sync.wire.payload import Storages

__all__ = ["LiveSource"]


class LiveSource:
    """Reads a source between `prepare` and `release`; a source with a `prepare` may be read only once.

    Args:
        make: returns this rank's source; called in the first `prepare`.
    """

    def __init__(self, make: Callable[[], Source]) -> None:
        self._make = make
        self._source: Source | None = None
        self._read: Storages | None = None
        self._failure: Exception | None = None

    def prepare(self) -> None:
        """Let the source make its weights complete. Every trainer rank calls it, like a collective.

        A failure is raised by whatever reads next, where the peers can be told of it.
        """
        self.release()
        self._failure = None
        try:
            self._source = self._source or self._make()
            prepare = getattr(self._source, "prepare", None)
            if prepare is not None:
                prepare()
        except Exception as error:  # noqa: BLE001
            self._failure = error

    def manifest(self) -> Manifest:
        """Return this rank's boxes."""
        return self._prepared().manifest()

    def check(self, held: Manifest) -> None:
        """Check all trainer ranks' boxes together, as the source says that they divide tensors.

        Raises:
            UnsupportedLayout: naming each tensor with a hole, and of a source that `tiles` also each
                with rectangles that overlap.
        """
        (check_tiling if getattr(self._prepared(), "tiles", False) else check_all_held)(held)

    def storages(self) -> Storages:
        """Return the live storages, as they were when first asked for since `prepare`."""
        source = self._prepared()
        if self._read is None:
            self._read = source.storages()
        return self._read

    def release(self) -> None:
        """Let go of the storages, which the trainer may want to free."""
        self._read = None

    def _prepared(self) -> Source:
        if self._failure is not None:
            raise self._failure
        if self._source is None:
            raise Fp8SyncError("the source was not prepared")
        return self._source
