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
from fp8sync.sources.wrapped import check_readable, unwrapped
from fp8sync.trainers import rank_and_size

if TYPE_CHECKING:
    from fp8sync.manifest import Manifest
    from fp8sync.wire.payload import Storages

__all__ = ["CheckpointSource", "LiveSource", "ModuleSource", "Source", "as_source"]


class Source(Protocol):
    """What a link needs of a trainer; implement it for a trainer of your own.

    A source may also have a method `prepare()`. It is called on every trainer rank, like a collective,
    when a link is made and at each refit, before anything is read: the place to make weights complete
    that the trainer has left for later (an all-gather that is due in the next forward).

    Replicas of a tensor may be cut differently. A source of which that can only be a mistake has an
    attribute `tiles = True`; then boxes that overlap and are not equal are refused.

    Examples:
        >>> class Head:
        ...     def __init__(self, weight):
        ...         self.weight = weight
        ...
        ...     def manifest(self):
        ...         info = TensorInfo("lm_head.weight", tuple(self.weight.shape), "bfloat16")
        ...         at = Placement("head", 0, self.weight.stride())
        ...         return Manifest.of([info], {0: [Box(info.name, (0, 0), info.shape, at)]})
        ...
        ...     def storages(self):
        ...         return {"head": self.weight}
        >>> from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
        >>> source = Head(torch.zeros(256, 128, dtype=torch.bfloat16))
        >>> as_source(source) is source
        True
    """

    def manifest(self) -> Manifest:
        """Return this rank's boxes, without copying a weight.

        Its ranks are keys of the default group's; every element of a tensor has to be on some rank.

        Raises:
            UnsupportedLayout: whatever cannot be listed, all of it at once.
        """

    def storages(self) -> Storages:
        """Return the live storages that the boxes point into, as they are now, all on one device.

        They may be parameters: they are read without autograd.
        """


def as_source(model: Any, bridge: Any = None, *, master: bool = False) -> Source:
    """Return `model` itself if it is a `Source`, or a source for it.

    Args:
        model: a `torch.nn.Module` with Hugging Face parameter names, plain or sharded (FSDP2, DTensor),
            also in torch's DDP or compiled, as a whole or in part; the path of a Hugging Face directory; or
            a `Source`. With a bridge, a Megatron-Core model: the list of its chunks on this rank, or its
            only one.
        bridge: the `megatron.bridge.AutoBridge` of a Megatron-Core model. With a path, that of a
            Megatron distributed checkpoint.
        master: whether to read its optimizer's FP32 masters; see `MegatronSource`.

    Raises:
        UnsupportedLayout: nothing here can list the boxes of such an object, or files cannot be read.

    Examples:
        >>> type(as_source(torch.nn.Linear(3, 2))).__name__
        'ModuleSource'
    """
    if master and (bridge is None or isinstance(model, (str, Path))):
        raise UnsupportedLayout(
            f"master=True: expected Megatron-Core chunks and their bridge=, found {type(model).__name__}"
        )
    if bridge is not None and isinstance(model, (str, Path)):
        from fp8sync.sources.megatron import DistributedCheckpointSource

        return DistributedCheckpointSource(model, bridge)
    if bridge is not None:
        from fp8sync.sources.megatron import MegatronSource

        return MegatronSource(model, bridge, master=master)
    if isinstance(model, (str, Path)):
        if (Path(model) / ".metadata").exists():
            raise UnsupportedLayout(
                f"{model} is a distributed checkpoint: expected the bridge= that knows its mappings"
            )
        return CheckpointSource(model)
    if isinstance(model, torch.nn.Module):
        return _source_of(model, rank_and_size()[0])
    if callable(getattr(model, "manifest", None)) and callable(getattr(model, "storages", None)):
        return model
    wanted = "a torch.nn.Module, a directory, a Source, or with bridge=... Megatron-Core chunks"
    raise UnsupportedLayout(f"cannot read weights from {type(model).__name__}: expected {wanted}")


def _source_of(module: torch.nn.Module, rank: int) -> Source:
    module = unwrapped(module)
    check_readable(module)
    if "torch.distributed.tensor" in sys.modules:  # without it there are no DTensors
        from fp8sync.sources.dtensor import DTensorSource, holds_dtensors

        if holds_dtensors(module):
            return DTensorSource(module, rank)
    return ModuleSource(module, rank)
