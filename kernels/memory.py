"""Tensors over memory known only by its address."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import torch


def bytes_at(address: int, size: int, device: torch.device) -> torch.Tensor:
    """uint8 ``[size]`` over existing memory, without a copy and without owning it.

    The memory must outlive the tensor. On CUDA, `device` must be able to address it.
    """
    if device.type == "cpu":
        buffer = (ctypes.c_uint8 * size).from_address(address)
        return torch.frombuffer(buffer, dtype=torch.uint8)
    interface = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=device)


def rectangle_at(
    address: int,
    shape: tuple[int, int],
    stride: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """``[rows, cols]`` over existing memory; `stride` in elements between rows."""
    rows, cols = shape
    if rows == 1:
        stride = cols
    elements = (rows - 1) * stride + cols
    flat = bytes_at(address, elements * dtype.itemsize, device).view(dtype)
    return flat.as_strided((rows, cols), (stride, 1))
