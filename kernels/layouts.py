"""Other layouts of the same scales: Transformer Engine's padding, and packed UE8M0 for Blackwell."""

from __future__ import annotations

import torch

from fp8sync_kernels.formulas import BLOCK

_TE_MULTIPLE = 4
_TMA_BYTES = 16


def strip_te_padding(scale_inv: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """``[ceil(N/128), round_up(ceil(K/128), 4)]`` of Transformer Engine -> no padding (a view).

    Args:
        scale_inv: float32, with any values in the padding (Transformer Engine leaves it unwritten).
        shape: (N, K) of the weight.

    Raises:
        ValueError: `scale_inv` is not padded that way (nor unpadded).

    Examples:
        >>> tuple(strip_te_padding(torch.ones(2, 4), (256, 384)).shape)
        (2, 3)
    """
    rows, cols = (-(-size // BLOCK) for size in shape)
    padded = -(-cols // _TE_MULTIPLE) * _TE_MULTIPLE
    if tuple(scale_inv.shape) not in {(rows, padded), (rows, cols)}:
        raise ValueError(
            f"scale_inv has shape {tuple(scale_inv.shape)}, a weight of {shape} has "
            f"{(rows, padded)} in Transformer Engine"
        )
    return scale_inv[:, :cols]


def add_te_padding(scale_inv: torch.Tensor) -> torch.Tensor:
    """``[R, C]`` -> ``[R, round_up(C, 4)]``, 1.0 in the padding as its distributed optimizer has.

    Examples:
        >>> add_te_padding(torch.full((1, 3), 0.5)).tolist()
        [[0.5, 0.5, 0.5, 1.0]]
    """
    rows, cols = scale_inv.shape
    padded = scale_inv.new_ones(rows, -(-cols // _TE_MULTIPLE) * _TE_MULTIPLE)
    padded[:, :cols] = scale_inv
    return padded


def to_ue8m0(scale_inv: torch.Tensor) -> torch.Tensor:
    """Biased exponents, uint8, of power-of-two scales; value 2^(e - 127).

    Raises:
        ValueError: a scale that is no normal power of two (the formula fp32 makes such).

    Examples:
        >>> to_ue8m0(torch.tensor([1.0, 0.5, 2.0**-20])).tolist()
        [127, 126, 107]
    """
    bits = scale_inv.contiguous().view(torch.int32)
    exponent = bits >> 23
    wrong = (bits & 0x7FFFFF != 0) | (exponent <= 0) | (exponent >= 255)
    if bool(wrong.any()):
        value = scale_inv.contiguous()[wrong][0].item()
        raise ValueError(f"{int(wrong.sum())} scales are no powers of two, {value} for one")
    return exponent.to(torch.uint8)


def from_ue8m0(exponents: torch.Tensor) -> torch.Tensor:
    """Float32 powers of two of biased exponents (uint8, 1..254).

    Examples:
        >>> from_ue8m0(torch.tensor([127, 126], dtype=torch.uint8)).tolist()
        [1.0, 0.5]
    """
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def pack_ue8m0(scale_inv: torch.Tensor, rows: int) -> torch.Tensor:
    """128x128 block scales as DeepGEMM's SM100 kernels read them for the weight operand.

    The layout, from DeepGEMM's README and its reference ``get_mn_major_tma_aligned_packed_ue8m0``:
    each block row's scales are repeated for its rows; four scales that follow each other along K
    share an int32, the first in its lowest byte; K is padded to a multiple of 4 with zero bytes;
    memory is MN-major (rows adjacent), with the rows' extent aligned to 16 bytes for TMA.

    Args:
        scale_inv: float32 ``[ceil(rows/128), C]``, powers of two; of a stack of experts ``[E, ...]``.
        rows: of a weight.

    Returns:
        int32 ``[rows, ceil(C/4)]``, strides (1, round_up(rows, 4)); of a stack ``[E, ...]``, each
        expert's behind the other's.

    Raises:
        ValueError: shapes that do not match, or scales that are no powers of two.

    Examples:
        >>> packed = pack_ue8m0(torch.tensor([[1.0, 0.5, 0.25, 0.125]]), rows=128)
        >>> tuple(packed.shape), packed.stride(), hex(packed[0, 0].item())
        ((128, 1), (1, 128), '0x7c7d7e7f')
    """
    if scale_inv.shape[-2] != -(-rows // BLOCK):
        raise ValueError(f"{scale_inv.shape[-2]} rows of scales for {rows} rows of weight")
    exponents = to_ue8m0(scale_inv).repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
    stack, cols = exponents.shape[:-2], exponents.shape[-1]
    words = -(-cols // 4)
    aligned_rows = -(-rows // (_TMA_BYTES // 4)) * (_TMA_BYTES // 4)
    quads = exponents.new_zeros(*stack, rows, words * 4)
    quads[..., :cols] = exponents
    packed = exponents.new_zeros(*stack, words, aligned_rows, 4)
    packed[..., :rows, :] = quads.view(*stack, rows, words, 4).transpose(-3, -2)
    return packed.view(torch.int32).squeeze(-1)[..., :rows].transpose(-2, -1)
