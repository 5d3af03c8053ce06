"""What a refit costs the host itself: the time in which it waits for nobody.

Waits mark themselves (`waiting`): for a GPU, the wire, a peer, vLLM. On a trainer without a GPU the
processor quantizes in its place, and that counts as waiting for it.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["HostTime", "Laps", "device_work", "waiting"]


class _Waited(threading.local):
    seconds = 0.0
    nested = False


_waited = _Waited()


@contextmanager
def waiting() -> Iterator[None]:
    """Mark a wait of this thread; waits within it count once."""
    if _waited.nested:
        yield
        return
    _waited.nested = True
    began = time.perf_counter()
    try:
        yield
    finally:
        _waited.nested = False
        _waited.seconds += time.perf_counter() - began


def device_work(device: torch.device) -> AbstractContextManager[None]:
    """Mark what a GPU would do: on a processor it is waited for, a GPU is only told to."""
    return waiting() if device.type == "cpu" else nullcontext()


class HostTime:
    """Seconds of this thread's own work since it was made."""

    def __init__(self) -> None:
        self._began, self._waited = time.perf_counter(), _waited.seconds

    @property
    def seconds(self) -> float:
        """Wall seconds less those in `waiting`."""
        return time.perf_counter() - self._began - (_waited.seconds - self._waited)


class Laps:
    """Seconds of stages that follow each other, from when it was made."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        """Count the time since the last stage ended."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
