"""Python's garbage collector, out of the way while a link is made and while a version is sent."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector from running.

    Manifests, traces and plans are hundreds of thousands of small objects that live on, and the
    collector would walk all of them again and again while they are made. Where every weight of a large
    trainer is looked up or moved, a walk of the trainer's own objects takes longer than that.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
