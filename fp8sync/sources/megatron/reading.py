"""One local parameter, or its master, as tensors' descriptions, boxes and live storages."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from fp8sync.manifest import Box, TensorInfo
from fp8sync.sources.megatron.boxes import SCALE_SUFFIX, boxes_of, infos_of
from fp8sync.sources.megatron.held import held
from fp8sync.sources.megatron.mappings import Site, layout_of
from fp8sync.sources.megatron.masters import MASTER_SUFFIX, master_boxes

if TYPE_CHECKING:
    import torch

    from fp8sync.sources.megatron.masters import Master, Masters
    from fp8sync.sources.megatron.parameters import LocalParameter

__all__ = ["Described", "describe", "live"]


class Described(NamedTuple):
    """What a parameter adds to the manifest."""

    infos: list[TensorInfo]
    boxes: list[Box]


def describe(parameter: LocalParameter, masters: Masters | None) -> Described:
    """List a parameter's HF tensors and boxes; its elements are not read.

    Raises:
        ValueError: it is not boxes, or not held in a way that can be sent.
    """
    tensor = parameter.live()
    site = Site.of(parameter.mapping, parameter.module, parameter.kept, parameter.vocabulary)
    site = replace(site, shape=tuple(tensor.shape))
    layout = layout_of(site)
    master = _master(parameter, masters)
    if master is not None:
        infos = [TensorInfo(name, shape, "float32") for name, shape in layout.shapes.items()]
        boxes = master_boxes(parameter.name + MASTER_SUFFIX, layout, site.shape, master)
        return Described(infos, list(boxes))
    state = held(tensor)
    return Described(list(infos_of(layout, state)), list(boxes_of(parameter.name, layout, state)))


def live(parameter: LocalParameter, masters: Masters | None) -> dict[str, torch.Tensor]:
    """Return the storages that the boxes of `describe` point into, as they are now.

    Raises:
        ValueError: it is not held in a way that can be sent.
    """
    master = _master(parameter, masters)
    if master is not None:
        tensor = master.tensor
        return {} if tensor is None else {parameter.name + MASTER_SUFFIX: tensor.detach()}
    state = held(parameter.live())
    if state.scale_inv is None:
        return {parameter.name: state.weight}
    return {parameter.name: state.weight, parameter.name + SCALE_SUFFIX: state.scale_inv}


def _master(parameter: LocalParameter, masters: Masters | None) -> Master | None:
    return masters.of(parameter.kept, parameter.expert) if masters else None
