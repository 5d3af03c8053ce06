"""KV-cache scales beside a trainer's weights: one scalar tensor each, on the misc path of every refit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.errors import TensorMismatch
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.sources import as_source

if TYPE_CHECKING:
    from fp8sync.sources import Source

__all__ = ["KvScaleSource", "KvScales"]


KvScales = Mapping[str, "float | torch.Tensor"]
"""By vLLM's parameter name, such as `model.layers.0.self_attn.attn.k_scale`: what stored keys or values
are multiplied by, one positive number each."""


class KvScaleSource:
    """A trainer's weights together with KV-cache scales.

    Nothing is looked at before `prepare`, so that a failure is told to all ranks.

    Args:
        model: whatever `as_source` takes.
        scales: their names are fixed by the first manifest; values are read anew by each `storages`.
        rank: this trainer rank; rank 0's scales are sent.
    """

    def __init__(self, model: Any, scales: KvScales, rank: int) -> None:
        self._model, self._scales, self._rank = model, scales, rank
        self._made: Source | None = None
        self._names: tuple[str, ...] = ()
        self._tensors: dict[str, torch.Tensor] = {}

    @property
    def _source(self) -> Source:
        self._made = self._made or as_source(self._model)
        return self._made

    @property
    def tiles(self) -> bool:
        """Whether the trainer's ranks divide tensors in one way alone."""
        return getattr(self._source, "tiles", False)

    def prepare(self) -> None:
        """Let the trainer complete its weights, where it has to."""
        prepare = getattr(self._source, "prepare", None)
        if prepare is not None:
            prepare()

    def manifest(self) -> Manifest:
        """Return the trainer's boxes and, on rank 0, one per scale.

        Raises:
            TensorMismatch: a scale is not one positive finite number, or is named as a weight.
        """
        own = self._source.manifest()
        if self._rank > 0:
            return own
        self._names = tuple(_checked(self._scales))
        twice = [
            f"{n}: the trainer has a weight of this name" for n in self._names if n in own.tensors
        ]
        if twice:
            raise TensorMismatch("KV-cache scales", twice)
        infos = [TensorInfo(name, (), "float32") for name in self._names]
        boxes = [Box(name, (), (), Placement(name, 0, ())) for name in self._names]
        ranks = {**own.ranks, self._rank: (*own.ranks.get(self._rank, ()), *boxes)}
        return Manifest.of([*own.tensors.values(), *infos], ranks)

    def storages(self) -> dict[str, torch.Tensor]:
        """Return the trainer's live storages and the scales, all on the weights' device.

        Raises:
            TensorMismatch: a scale is gone, or is not one positive finite number.
        """
        weights = self._source.storages()
        if self._rank > 0:
            return dict(weights)
        values = _checked(self._scales)
        if gone := [f"{n}: expected a scale, found none" for n in self._names if n not in values]:
            raise TensorMismatch("KV-cache scales", gone)
        device = next((t.device for t in weights.values()), torch.device("cpu"))
        for name in self._names:
            held = self._tensors.get(name)
            if held is None or held.device != device:
                held = self._tensors[name] = torch.empty((), dtype=torch.float32, device=device)
            held.fill_(values[name])
        return {**weights, **self._tensors}


def _checked(scales: KvScales) -> dict[str, float]:
    values = {}
    faults = []
    for name, scale in scales.items():
        value = float(scale) if not isinstance(scale, torch.Tensor) or scale.numel() == 1 else -1.0
        if math.isfinite(value) and value > 0:
            values[name] = value
        else:
            found = tuple(scale.shape) if isinstance(scale, torch.Tensor) and value < 0 else value
            faults.append(f"{name}: expected one positive number, found {found}")
    if faults:
        raise TensorMismatch("KV-cache scales", faults)
    return values
