"""`fp8sync verify` for Megatron-Core trainers without a GPU: torchrun starts this module in its place."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from fp8sync.cli import main
from fp8sync.recipe import Formula
from fp8sync.verify import trainers
from tests.megatron import cpu, pairs

if TYPE_CHECKING:
    from pathlib import Path

    import torch

FP8_NOTE = "FP8 parameters as Transformer Engine describes them, on CPU buffers without it"


def build(path: Path, axes: dict[str, int], *, fp8_parameters: bool) -> tuple[Any, list[Any], str]:
    cpu.import_bridge()
    from megatron.bridge import AutoBridge

    from fp8sync.sources.megatron import MegatronSource

    bridge = AutoBridge.from_hf_pretrained(str(path))
    chunks = cpu.build_chunks(bridge, axes)
    if fp8_parameters:
        pairs.quantize_in_place(chunks, Formula.POW2)
        for _, parameter in pairs.linear_weights(chunks):
            parameter.get_metadata = partial(requantized, parameter)
    return MegatronSource(chunks, bridge), chunks, FP8_NOTE if fp8_parameters else ""


def requantized(parameter: torch.Tensor) -> dict[str, Any]:
    """Metadata whose buffers follow the parameter, as they do when Transformer Engine's is written to."""
    metadata = parameter.metadata
    codes, scale_inv = pairs.buffers(parameter.detach(), Formula.POW2)
    metadata["rowwise_data"].copy_(codes)
    metadata["rowwise_scale_inv"].copy_(scale_inv)
    return metadata


if __name__ == "__main__":
    trainers.build_megatron = build
    sys.exit(main(["verify", *sys.argv[1:]]))
