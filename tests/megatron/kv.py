"""KV-cache scales of a divided model against those of the same model on one rank, and of Hugging Face's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import fp8sync
from tests.megatron import cpu
from tests.megatron.checks import load

if TYPE_CHECKING:
    from pathlib import Path

WAYS: list[dict[str, Any]] = [{}, {"percentile": 90.0, "margin": 1.5}]


def check_kv(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Equal where the arithmetic is the same: in all layers of pipeline stages, in the first of TP's.

    Tensor parallelism adds up attention's output in another order, so what later layers are given, and
    Hugging Face's model has kernels of its own: a step of BF16 is seen there.
    """
    faults = []
    for way in WAYS:
        found, alone = _scales(checkpoint, axes, way), _scales(checkpoint, {}, way)
        theirs = _hugging_face(checkpoint, way)
        if not found.keys() == alone.keys() == theirs.keys():
            faults.append(f"expected {sorted(theirs)}, found {sorted(found)} and {sorted(alone)}")
        for name in found.keys() & alone.keys() & theirs.keys():
            same = axes.get("tp", 1) == 1 or ".layers.0." in name
            if _steps(found[name], alone[name]) > (0 if same else 1):
                faults.append(f"{name}: {found[name]} {axes}, {alone[name]} on one rank")
            if _steps(alone[name], theirs[name]) > 1:
                faults.append(f"{name}: {alone[name]}, {theirs[name]} of Hugging Face's model")
    return faults


def check_kv_of_replicas(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Of data-parallel ranks with a batch each, the largest scale of each layer counts, on every rank."""
    from megatron.core import parallel_state

    bridge, chunks = load(checkpoint, axes)
    of_each = [_calibrated(chunks, bridge, [batch], {"percentile": 50.0}) for batch in batches()]
    own = batches()[parallel_state.get_data_parallel_rank()]
    found = _calibrated(chunks, bridge, [own], {"percentile": 50.0})
    expected = {name: max(scales[name] for scales in of_each) for name in of_each[0]}
    largest = {
        number for name in expected for number in (0, 1) if of_each[number][name] == expected[name]
    }
    faults = [] if largest == {0, 1} else [f"only batch {largest} counts, whatever the ranks do"]
    return faults if found == expected else [*faults, f"expected {expected}, found {found}"]


def _steps(a: torch.Tensor, b: torch.Tensor) -> int:
    """By how many BF16 values two positive scales differ."""
    first, second = (t.to(torch.bfloat16).view(torch.int16).item() for t in (a, b))
    return int(abs(first - second))


def _hugging_face(checkpoint: Path, way: dict[str, Any]) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=torch.bfloat16)
    return fp8sync.calibrate_kv(model, batches(), **way)


def _scales(checkpoint: Path, axes: dict[str, int], way: dict[str, Any]) -> dict[str, torch.Tensor]:
    bridge, chunks = load(checkpoint, axes)
    return _calibrated(chunks, bridge, batches(), way)


def _calibrated(
    chunks: list, bridge: Any, given: list[Any], way: dict[str, Any]
) -> dict[str, torch.Tensor]:
    with cpu.said_to_be_cuda():
        return fp8sync.calibrate_kv(chunks, given, bridge=bridge, **way)


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    first, last = (torch.randint(0, 256, (2, n), generator=generator) for n in (16, 24))
    mask = torch.ones_like(last)
    mask[1, 20:] = 0
    return [first, {"input_ids": last, "attention_mask": mask}]
