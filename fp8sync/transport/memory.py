"""One-sided writing: another process's GPU memory, mapped into this one by CUDA IPC.

The owner exports one allocation; a writer on the same host maps it with its own GPU current, and from
then on stores to it like to its own memory, over NVLink where there is one. Nothing runs on the owner's
GPU. Within one process the address is used as it is.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.errors import Fp8SyncError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ExportedMemory",
    "MappedMemory",
    "allocate",
    "export_memory",
    "gpu_id",
    "host_id",
    "reader_of",
]

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_NO_MEMORY = 2
_PEER_ACCESS_ENABLED = 704


@cache
def host_id() -> str:
    """Return what two processes share exactly when they can map each other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}"


_TOKEN = secrets.token_hex(8)


def _process_id() -> str:
    """Return what no other process has; processes of two containers may have the same number."""
    return f"{os.getpid()}/{_TOKEN}"


def gpu_id(device: torch.device) -> str:
    """Return the identity of a GPU, the same in every process; an empty string for a processor."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def reader_of(storages: Mapping[str, torch.Tensor]) -> torch.device:
    """Return the device whose kernels read a rank's storages: theirs, as they are all on one.

    Pinned memory of the host has the same address on a GPU, whose kernels read it as it passes; so it is
    this process's GPU that quantizes parameters that were offloaded there.
    """
    tensors = [tensor for tensor in storages.values() if tensor.numel()]
    device = next(iter(tensors or storages.values())).device
    on_host = device.type == "cpu" and torch.cuda.is_available()
    if on_host and all(tensor.is_pinned() for tensor in tensors):
        return torch.device("cuda", torch.cuda.current_device())
    return device


@dataclass(frozen=True)
class ExportedMemory:
    """An allocation that others may write: plain data, for the control channel.

    `handle` is CUDA's IPC handle in hex, empty for memory of the processor, which only its own
    process can write.
    """

    host: str
    process: str
    device: int
    address: int
    nbytes: int
    handle: str

    def to_json(self) -> dict[str, Any]:
        """Return the description as JSON-able data."""
        return asdict(self)

    @property
    def reachable(self) -> bool:
        """Whether this process can write there."""
        return self.host == host_id() and (self.process == _process_id() or bool(self.handle))


class _Allocation:
    """A CUDA allocation of its own; freed with the last tensor over it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        pointer = ctypes.c_void_p()
        self._device = device
        self._free = _runtime().cudaFree
        self._free.argtypes = [ctypes.c_void_p]
        request = ctypes.byref(pointer), ctypes.c_size_t(nbytes)
        with torch.cuda.device(device):
            status = _runtime().cudaMalloc(*request)
            if status == _NO_MEMORY:
                _runtime().cudaGetLastError()
                torch.cuda.empty_cache()  # what torch keeps for later is free, too
                status = _runtime().cudaMalloc(*request)
        _check(status, f"cudaMalloc of {nbytes} bytes")
        self._address = int(pointer.value or 0)
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self._address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        address, self._address = getattr(self, "_address", 0), 0
        if address:
            self._free(address)


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return uint8 [nbytes] that can be exported.

    A tensor of torch's allocator may lie anywhere inside a segment, and an IPC handle always means the
    whole segment: a writer would hit other tensors. So CUDA memory is allocated by itself.
    """
    if device.type != "cuda" or nbytes == 0:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    return torch.as_tensor(_Allocation(nbytes, device), device=device)


def export_memory(memory: torch.Tensor) -> ExportedMemory:
    """Describe a uint8 tensor made by `allocate`.

    Raises:
        Fp8SyncError: it does not begin where its allocation does, or CUDA refuses to share it.
    """
    handle = ""
    if memory.device.type == "cuda":
        offset = memory.data_ptr() - _allocation_base(memory)
        if offset:
            raise Fp8SyncError(
                f"cannot share a tensor that lies {offset} bytes into its allocation"
            )
        raw = (ctypes.c_ubyte * _HANDLE_BYTES)()
        runtime = _runtime()
        runtime.cudaIpcGetMemHandle.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        with torch.cuda.device(memory.device):
            _check(runtime.cudaIpcGetMemHandle(raw, memory.data_ptr()), "cudaIpcGetMemHandle")
        handle = bytes(raw).hex()
    owner = host_id(), _process_id(), memory.device.index or 0
    return ExportedMemory(*owner, memory.data_ptr(), memory.numel(), handle)


class MappedMemory:
    """An exported allocation as this process addresses it; unmapped by `close`.

    Args:
        exported: what the owner sent.
        device: the GPU that will write.
    """

    def __init__(self, exported: ExportedMemory, device: torch.device) -> None:
        self._device = device
        self._mapped: int | None = None
        self.address = exported.address
        if exported.process == _process_id():
            if device.type == "cuda" and device.index != exported.device:
                self._enable_peer(exported.device)
            return
        raw = (ctypes.c_ubyte * _HANDLE_BYTES)(*bytes.fromhex(exported.handle))
        pointer = ctypes.c_void_p()
        with torch.cuda.device(device):
            status = _open(ctypes.byref(pointer), _Handle(raw), _LAZY_PEER_ACCESS)
        _check(
            status,
            "trainer and engine share a host, but not its memory (are they in containers without a common "
            "IPC namespace? then choose transport='nccl'): cudaIpcOpenMemHandle",
        )
        self._mapped = self.address = int(pointer.value or 0)

    def close(self) -> None:
        """Unmap the memory."""
        if self._mapped is not None:
            runtime = _runtime()
            runtime.cudaIpcCloseMemHandle.argtypes = [ctypes.c_void_p]
            with torch.cuda.device(self._device):
                runtime.cudaIpcCloseMemHandle(self._mapped)
            self._mapped = None

    def _enable_peer(self, peer: int) -> None:
        with torch.cuda.device(self._device):
            status = _runtime().cudaDeviceEnablePeerAccess(peer, 0)
        if status == _PEER_ACCESS_ENABLED:
            _runtime().cudaGetLastError()
        else:
            _check(status, "cudaDeviceEnablePeerAccess")


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


def _open(pointer: Any, handle: _Handle, flags: int) -> int:
    function = _runtime().cudaIpcOpenMemHandle
    function.argtypes = [ctypes.c_void_p, _Handle, ctypes.c_uint]
    return int(function(pointer, handle, flags))


def _allocation_base(memory: torch.Tensor) -> int:
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    query = ctypes.CDLL("libcuda.so.1").cuMemGetAddressRange_v2
    with torch.cuda.device(memory.device):
        status = query(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(memory.data_ptr()))
    _check(status, "cuMemGetAddressRange")
    return base.value


@cache
def _runtime() -> Any:
    """The CUDA runtime that torch has loaded."""
    major = (torch.version.cuda or "").partition(".")[0]
    torch.cuda.init()
    return ctypes.CDLL(f"libcudart.so.{major}")


def _check(status: int, what: str) -> None:
    """Raise a failure, and have CUDA forget it: torch would find it when it next launches a kernel."""
    if status:
        _runtime().cudaGetLastError()
        raise Fp8SyncError(f"{what} failed with CUDA error {status}")
