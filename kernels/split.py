"""Taking FP8 pairs apart: fused QKV, gate-up halves, expert stacks, tensor-parallel slices.

A row of scale_inv covers 128 rows of weight. Cutting both is exact, a plain slice, where every cut
lies on a multiple of 128 of the fused tensor's rows (or columns). Elsewhere a destination block
would need rows of two source blocks, and there is no right scale_inv: that is refused, naming the
cut. `fp8sync_kernels.requantize` is the way out, to be taken knowingly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fp8sync_kernels.formulas import BLOCK


class Pair(NamedTuple):
    """An FP8 matrix, or with leading dims a stack of them.

    Attributes:
        weight: float8_e4m3fn (or uint8) ``[N, K]``.
        scale_inv: float32 ``[ceil(N/128), ceil(K/128)]``.

    Examples:
        >>> pair = Pair(torch.zeros(256, 384, dtype=torch.uint8), torch.ones(2, 3))
    """

    weight: torch.Tensor
    scale_inv: torch.Tensor


class MisalignedCutError(ValueError):
    """A cut that no slice of scale_inv can follow. The message names it.

    Examples:
        >>> slice_pair(Pair(torch.zeros(256, 128), torch.ones(2, 1)), -2, 0, 64, what="k")
        Traceback (most recent call last):
        ...
        fp8sync_kernels.split.MisalignedCutError: k is cut at row 64, inside the block of rows 0..127: scale_inv cannot be split there
    """


def slice_pair(pair: Pair, dim: int, start: int, stop: int, *, what: str = "slice") -> Pair:
    """Elements [start, stop) of one dim, with their scales; views, no copies.

    Args:
        pair: 2-D, or with leading dims (expert stacks), which are kept.
        dim: -2 (rows) or -1 (columns).
        start: first element; a multiple of 128.
        stop: one past the last; a multiple of 128, or the end of the dim.
        what: names the slice in errors.

    Raises:
        MisalignedCutError: a cut inside a block.
        ValueError: the range lies outside the tensor, another dim, or scales that are not one for each
            block of it (padded ones, say).

    Examples:
        >>> pair = Pair(torch.zeros(256, 384), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        >>> slice_pair(pair, -1, 128, 384).scale_inv.tolist()
        [[2.0, 3.0], [5.0, 6.0]]
    """
    size = _size(pair, dim)
    if not 0 <= start <= stop <= size:
        raise ValueError(f"{what}: [{start}, {stop}) of a dim of {size}")
    blocks, found = -(-size // BLOCK), pair.scale_inv.shape[dim]
    if found != blocks:
        raise ValueError(
            f"{what}: expected scale_inv with {blocks} blocks in dim {dim}, found {found}"
        )
    if start % BLOCK:
        raise MisalignedCutError(_refusal(what, dim, start))
    if stop % BLOCK and stop != size:
        raise MisalignedCutError(_refusal(what, dim, stop))
    weight = pair.weight.narrow(dim, start, stop - start)
    first = start // BLOCK
    scale_inv = pair.scale_inv.narrow(dim, first, -(-stop // BLOCK) - first)
    return Pair(weight, scale_inv)


def shard_pair(pair: Pair, dim: int, rank: int, world_size: int) -> Pair:
    """The tensor-parallel slice of one rank (even division of a dim).

    Raises:
        MisalignedCutError: the shards' size is not a multiple of 128.
        ValueError: the dim does not divide by `world_size`, there is no such rank, another dim, or
            scales that do not fit.

    Examples:
        >>> pair = Pair(torch.zeros(512, 128), torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
        >>> shard_pair(pair, -2, rank=1, world_size=2).scale_inv.tolist()
        [[3.0], [4.0]]
    """
    size = _size(pair, dim)
    if not 0 <= rank < world_size:
        raise ValueError(f"no rank {rank} of {world_size}")
    if size % world_size:
        raise ValueError(f"a dim of {size} does not divide among {world_size} ranks")
    each = size // world_size
    what = f"shard {rank} of {world_size}"
    return slice_pair(pair, dim, rank * each, (rank + 1) * each, what=what)


def split_gate_up(pair: Pair) -> tuple[Pair, Pair]:
    """(gate, up): the halves of ``[..., 2 * I, H]``.

    Raises:
        MisalignedCutError: I is not a multiple of 128.
        ValueError: an odd number of rows.

    Examples:
        >>> gate, up = split_gate_up(Pair(torch.zeros(256, 128), torch.tensor([[1.0], [2.0]])))
        >>> tuple(up.weight.shape), up.scale_inv.tolist()
        ((128, 128), [[2.0]])
    """
    rows = pair.weight.shape[-2]
    if rows % 2:
        raise ValueError(f"gate-up of {rows} rows has no halves")
    half = rows // 2
    gate = slice_pair(pair, -2, 0, half, what="gate")
    return gate, slice_pair(pair, -2, half, rows, what="up")


def split_experts(pair: Pair) -> list[Pair]:
    """The experts of a stack ``[E, N, K]`` with scale_inv ``[E, ceil(N/128), ceil(K/128)]``.

    Raises:
        ValueError: the tensors are not such a stack.

    Examples:
        >>> len(split_experts(Pair(torch.zeros(8, 256, 128), torch.ones(8, 2, 1))))
        8
    """
    weight, scale_inv = pair
    blocks = tuple(-(-size // BLOCK) for size in weight.shape[1:])
    if weight.dim() != 3 or tuple(scale_inv.shape) != (weight.shape[0], *blocks):
        raise ValueError(
            f"not a stack of experts: weight {tuple(weight.shape)}, "
            f"scale_inv {tuple(scale_inv.shape)}"
        )
    return [Pair(w, s) for w, s in zip(weight.unbind(), scale_inv.unbind(), strict=True)]


def split_qkv(
    pair: Pair, *, query_heads: int, groups: int, head_dim: int, output_gate: bool = False
) -> dict[str, Pair]:
    """Undo Megatron's interleave of a fused QKV weight (or one tensor-parallel shard of it).

    The rows of each query group are its query heads, [their gates,] one key head, one value head.

    Args:
        pair: ``[groups * (query heads per group [* 2] + 2) * head_dim, H]``.
        query_heads: in `pair` (all groups together).
        groups: query groups (key-value heads) in `pair`.
        head_dim: rows of a head.
        output_gate: the layout has gates.

    Returns:
        "q", "k", "v" (and "z", the gates), heads in order; new tensors.

    Raises:
        MisalignedCutError: a boundary inside a group is no multiple of 128 rows.
        ValueError: the numbers do not describe the tensor.

    Examples:
        >>> fused = Pair(torch.zeros(1024, 128), torch.arange(8.0).view(8, 1))
        >>> parts = split_qkv(fused, query_heads=4, groups=2, head_dim=128)
        >>> {name: part.scale_inv.flatten().tolist() for name, part in parts.items()}
        {'q': [0.0, 1.0, 4.0, 5.0], 'k': [2.0, 6.0], 'v': [3.0, 7.0]}
    """
    if groups <= 0 or query_heads % groups:
        raise ValueError(f"{query_heads} query heads do not divide among {groups} groups")
    each = query_heads // groups * head_dim
    sections = [("q", each), *([("z", each)] if output_gate else []), ("k", head_dim)]
    sections.append(("v", head_dim))
    group_rows = sum(rows for _, rows in sections)
    if pair.weight.shape[-2] != groups * group_rows:
        raise ValueError(
            f"{groups} groups of {group_rows} rows make {groups * group_rows}, "
            f"the weight has {pair.weight.shape[-2]}"
        )
    parts: dict[str, list[Pair]] = {name: [] for name, _ in sections}
    at = 0
    for group in range(groups):
        for name, rows in sections:
            what = f"{name} of query group {group} (head_dim {head_dim})"
            parts[name].append(slice_pair(pair, -2, at, at + rows, what=what))
            at += rows
    return {name: _concatenate(pieces) for name, pieces in parts.items()}


def _size(pair: Pair, dim: int) -> int:
    if dim not in (-2, -1):
        raise ValueError(f"dim {dim} has no blocks; use -2 or -1")
    return pair.weight.shape[dim]


def _concatenate(pieces: list[Pair]) -> Pair:
    # As bytes: not every PyTorch concatenates FP8.
    dtype = pieces[0].weight.dtype
    weight = torch.cat([piece.weight.view(torch.uint8) for piece in pieces], dim=-2).view(dtype)
    return Pair(weight, torch.cat([piece.scale_inv for piece in pieces], dim=-2))


def _refusal(what: str, dim: int, at: int) -> str:
    kind = "row" if dim == -2 else "column"
    below, above = at // BLOCK * BLOCK, -(-at // BLOCK) * BLOCK
    return (
        f"{what} is cut at {kind} {at}, inside the block of {kind}s {below}..{above - 1}: "
        f"scale_inv cannot be split there"
    )
