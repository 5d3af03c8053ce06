"""Mamba and gated delta networks in a distributed checkpoint, which is read as one rank's parameters.

Megatron-Core saves their projections in parts, each divided by itself, so that any layout can load them. On one
rank the parameter is its parts, one below the other, and a mapping of Megatron-Bridge does no more than move rows.
Where to, the mapping itself is asked: it converts the numbers of the rows. A zero-centred norm is a small vector,
and is converted when the checkpoint is opened.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.sources.megatron.pieces import Layout, Piece

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fp8sync.sources.megatron.pieces import Shape

__all__ = ["is_centred", "moved_rows", "moves_rows", "parts_of", "uncentred"]

_PARTS = (
    ("z", "x", "B", "C", "dt"),
    ("x", "B", "C"),
    ("query", "key", "value", "z", "beta", "alpha"),
    ("query", "key", "value"),
)
"""In the order of their rows; `_split_tensor_factory` in megatron/core/ssm (0.19.2)."""
_MOVERS = (
    "MambaInProjMapping",
    "MambaConv1dMapping",
    "GDNConv1dMapping",
    "GDNLinearMapping",
    "GDNLinearMappingSeparate",
)
_HOME = "megatron.bridge.models.conversion.param_mapping"


def parts_of(names: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield each parameter that is there in parts, and the names of its parts, in order."""
    found: dict[str, set[str]] = {}
    for name in names:
        whole, _, part = name.rpartition(".")
        found.setdefault(whole, set()).add(part)
    for whole, parts in found.items():
        for known in _PARTS:
            if parts == set(known):
                yield whole, [f"{whole}.{part}" for part in known]


def moves_rows(mapping: Any) -> bool:
    """Whether a mapping is one of those that, on one rank, do nothing but move rows."""
    return type(mapping).__module__ == _HOME and type(mapping).__name__ in _MOVERS


def is_centred(mapping: Any) -> bool:
    """Whether a mapping adds one to each element, and does nothing else."""
    kind = type(mapping)
    return kind.__module__ == _HOME and kind.__name__ == "RMSNorm2ZeroCenteredRMSNormMapping"


def uncentred(mapping: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return a norm's weight, or a part of it, as the mapping converts it."""
    (converted,) = mapping.megatron_to_hf(weight, _module(None)).values()
    return converted


def moved_rows(mapping: Any, config: Any, shape: Shape) -> Layout:
    """Say which rows of which HF tensors a whole parameter holds, as its mapping moves them.

    Args:
        mapping: one that `moves_rows`, resolved, whose process groups have one rank.
        config: Megatron's config of the model.
        shape: that of the parameter.

    Raises:
        ValueError: the mapping does not take such a parameter, or does not give each row once.
    """
    narrow = copy.copy(config)
    narrow.hidden_size = 1  # rows of one element, their numbers
    numbers = torch.arange(shape[0]).view(-1, *(1 for _ in shape[1:]))
    try:
        given = mapping.megatron_to_hf(numbers, _module(narrow))
    except (RuntimeError, IndexError, AssertionError) as error:
        raise ValueError(f"{type(mapping).__name__} does not take {list(shape)}: {error}") from None
    rows = {name: tensor.flatten().tolist() for name, tensor in given.items()}
    if sorted(row for own in rows.values() for row in own) != list(range(shape[0])):
        raise ValueError(f"{type(mapping).__name__} does not give each of {shape[0]} rows once")
    tail, zero = shape[1:], (0,) * len(shape[1:])
    return Layout(
        {name: (len(own), *tail) for name, own in rows.items()},
        tuple(
            Piece(name, (start, *zero), (own[start], *zero), (count, *tail))
            for name, own in rows.items()
            for start, count in _runs(own)
        ),
    )


def _module(config: Any) -> Any:
    """On one rank it makes no difference how a module is divided; this class the bridge knows."""
    return type("ColumnParallelLinear", (), {"config": config})()


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Yield begin and length of each stretch of rows that follow one another."""
    begin = 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at] != rows[at - 1] + 1:
            yield begin, at - begin
            begin = at
