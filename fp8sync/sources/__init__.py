"""Trainers, as boxes and live tensors. A new trainer is a new way to list boxes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.sources.checkpoint import CheckpointSource
from fp8sync.sources.live import LiveSource
from fp8sync.sources.module import ModuleSource
from fp8sync.trainers import rank_and_size

if TYPE_CHECKING:
    from fp8sync.manifest import Manifest
    from fp8sync.payload import Storages

__all__ = ["CheckpointSource", "LiveSource", "ModuleSource", "Source", "as_source"]


class Source(Protocol):
    """What a link needs of a trainer; implement it for a trainer of your own.

    A source may also have a method `prepare()`. It is called on every trainer rank, like a collective,
    when a link is made and at each refit, before anything is read: the place to make weights complete
    that the trainer has left for later (an all-gather that is due in the next forward).
    """

    def manifest(self) -> Manifest:
        """Return this trainer's boxes, without copying a weight."""

    def storages(self) -> Storages:
        """Return the live storages that the boxes point into, as they are now."""


def as_source(model: Any) -> Source:
    """Return `model` itself if it is a `Source`, or a source for it.

    Args:
        model: a `torch.nn.Module` with Hugging Face parameter names, plain or sharded (FSDP2,
            DTensor), the path of a Hugging Face directory, or a `Source`.

    Raises:
        UnsupportedLayout: nothing here can list the boxes of such an object.
    """
    if isinstance(model, (str, Path)):
        return CheckpointSource(model)
    if isinstance(model, torch.nn.Module):
        return _source_of(model, rank_and_size()[0])
    if callable(getattr(model, "manifest", None)) and callable(getattr(model, "storages", None)):
        return model
    raise UnsupportedLayout(
        f"cannot read weights from {type(model).__name__}: expected a torch.nn.Module, a directory or a Source"
    )


def _source_of(module: torch.nn.Module, rank: int) -> Source:
    if "torch.distributed.tensor" in sys.modules:  # without it there are no DTensors
        from fp8sync.sources.dtensor import DTensorSource, holds_dtensors

        if holds_dtensors(module):
            return DTensorSource(module, rank)
    return ModuleSource(module, rank)
