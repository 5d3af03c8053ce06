"""FP8 tensors as bytes and back, without copies.

The views alias: writing through one changes the other, and a view keeps the memory alive. A view is
of the same elements in the same order, so strides are kept; element (i, j) of an FP8 tensor is byte
(i, j) of its view. What torch cannot view without a copy is refused, never copied.
"""

from __future__ import annotations

import torch

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 view of an FP8 (or uint8) tensor, same shape and strides.

    Raises:
        TypeError: the dtype is wider than a byte.

    Examples:
        >>> weight = torch.tensor([1.0, -1.0]).to(torch.float8_e4m3fn)
        >>> as_bytes(weight)[1] = 0x40
        >>> weight.float().tolist()
        [1.0, 2.0]
    """
    if tensor.dtype not in (*_FP8, torch.uint8):
        raise TypeError(f"expected FP8 or uint8, got {tensor.dtype}")
    return tensor.detach().view(torch.uint8)


def as_fp8(tensor: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """FP8 view of a uint8 (or FP8) tensor, same shape and strides.

    Raises:
        TypeError: either dtype is not of one byte.

    Examples:
        >>> as_fp8(torch.tensor([0x38, 0x40], dtype=torch.uint8)).float().tolist()
        [1.0, 2.0]
    """
    if dtype not in _FP8:
        raise TypeError(f"expected an FP8 dtype, got {dtype}")
    return as_bytes(tensor).view(dtype)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 ``[nbytes]`` view of a contiguous tensor of any dtype.

    Raises:
        ValueError: the tensor is not contiguous.

    Examples:
        >>> flat_bytes(torch.ones(2, 3)).shape
        torch.Size([24])
    """
    if not tensor.is_contiguous():
        raise ValueError(f"not contiguous: shape {tuple(tensor.shape)}, strides {tensor.stride()}")
    return tensor.detach().view(-1).view(torch.uint8)


def typed_part(
    buffer: torch.Tensor, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """A tensor that lies in a uint8 buffer from `offset_bytes` on, as a view.

    Raises:
        ValueError: the part runs past the buffer, or does not start at a multiple of its itemsize.

    Examples:
        >>> bucket = torch.zeros(48, dtype=torch.uint8)
        >>> typed_part(bucket, 32, (2, 2), torch.float32).fill_(1.0).shape
        torch.Size([2, 2])
        >>> int(bucket.count_nonzero())
        8
    """
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    start = buffer.storage_offset() + offset_bytes
    if offset_bytes < 0 or offset_bytes + size > buffer.numel():
        raise ValueError(
            f"bytes {offset_bytes}..{offset_bytes + size} of a buffer of {buffer.numel()}"
        )
    if start % dtype.itemsize:
        raise ValueError(f"{dtype} cannot start at byte {start}, no multiple of {dtype.itemsize}")
    return buffer[offset_bytes : offset_bytes + size].view(dtype).view(shape)
