"""uint8 messages between GPUs over an NCCL communicator of our own, kept across refits.

NCCL is called directly: torch's own group ends the whole process when a peer is lost, and an engine
has to outlive its trainer. The communicator is non-blocking, so that joining has a time limit too, and
lives beside whatever communicators trainer and engine already have: no call here waits for another.

NCCL opens sockets of its own, and picks their interface when a process makes its first communicator. Where
all members are on this host, that is loopback, unless `NCCL_SOCKET_IFNAME` says otherwise.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.errors import EngineLost, Fp8SyncError, TransferTimeout
from fp8sync.waiting import waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp8sync.transport.group import Message
    from fp8sync.transport.invitation import Choice

__all__ = ["NcclGroup", "new_unique_id", "sockets"]

_ID_BYTES = 128
_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8, _FLOAT32 = 1, 7
_MAX = 2
_POLL_S = 2e-5


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_ubyte * _ID_BYTES),)


class _Config(ctypes.Structure):
    """`ncclConfig_t` as of 2.14, which later releases accept; all else stays at NCCL's defaults."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


_CONFIG = _Config(ctypes.sizeof(_Config), 0xCAFEBEEF, 21400, 0)


_INTERFACE = "NCCL_SOCKET_IFNAME"


@contextmanager
def sockets(*, loopback: bool) -> Iterator[None]:
    """Let NCCL choose its interface; with `loopback` that one, unless the user has named another.

    It counts where it is the process's first communicator that is made within. Afterwards the environment
    is as it was; NCCL goes on with what it has chosen.
    """
    if not loopback or _INTERFACE in os.environ:
        yield
        return
    os.environ[_INTERFACE] = "=lo"
    try:
        yield
    finally:
        os.environ.pop(_INTERFACE, None)


def new_unique_id(*, loopback: bool) -> str:
    """Return what the members of a new communicator meet by, in hex.

    Args:
        loopback: whether all of them are on this host.
    """
    found = _UniqueId()
    with sockets(loopback=loopback):
        _check(_nccl().ncclGetUniqueId(ctypes.byref(found)), "ncclGetUniqueId")
    return bytes(found.internal).hex()


class NcclGroup:
    """A member of a communicator.

    Args:
        unique_id: from `new_unique_id`, the same for all members.
        number: this member.
        names: of all members, by number, for errors.
        device: this member's GPU; no two members may share one.
        timeout_s: limit of every wait for a peer.
        loopback: whether all members are on this host.

    Raises:
        TransferTimeout: a member did not come in time.
        EngineLost: NCCL refuses; says why.
    """

    def __init__(
        self,
        unique_id: str,
        number: int,
        names: Sequence[str],
        device: torch.device,
        timeout_s: float,
        *,
        loopback: bool,
    ) -> None:
        self._names, self._device, self._timeout_s = names, device, timeout_s
        self._number = number
        # Another thread may close the group, and NCCL frees what a call is looking at.
        self._calling = threading.RLock()
        self._comm: ctypes.c_void_p | None = ctypes.c_void_p()
        made = _UniqueId((ctypes.c_ubyte * _ID_BYTES)(*bytes.fromhex(unique_id)))
        with torch.cuda.device(device), sockets(loopback=loopback):
            # Above the engine's own kernels: a transfer under way is not held up by a long forward.
            self._stream = torch.cuda.Stream(device, priority=-1)
            status = _nccl().ncclCommInitRankConfig(
                ctypes.byref(self._comm), len(names), made, number, ctypes.byref(_CONFIG)
            )
            others = [n for n in range(len(names)) if n != number]
            self._settle(status, others, "join the communicator")

    @classmethod
    def join(cls, choice: Choice, device: torch.device, timeout_s: float) -> NcclGroup:
        """Join the communicator that trainer rank 0 invites to."""
        about = choice["unique_id"], choice["rank"], choice["names"]
        return cls(*about, device, timeout_s, loopback=choice["loopback"])

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> torch.cuda.Event:
        """Enqueue one NCCL group on a stream of our own; see `Group`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        peers = [peer for _, peer in (*sends, *receives)]
        stream = ctypes.c_void_p(self._stream.cuda_stream)
        with torch.cuda.device(self._device):
            with self._calling:
                # Before the group is begun: one left open would swallow this thread's later calls.
                comm = self._alive()
                _check(_nccl().ncclGroupStart(), "ncclGroupStart")
                status = _SUCCESS
                for call, messages in ((_nccl().ncclSend, sends), (_nccl().ncclRecv, receives)):
                    for message, peer in messages:
                        address, size = ctypes.c_void_p(message.data_ptr()), message.numel()
                        found = call(address, size, _UINT8, peer, comm, stream)
                        status = status if found in (_SUCCESS, _IN_PROGRESS) else found
                ended = _nccl().ncclGroupEnd()
            self._settle(status or ended, peers, "join an exchange")
            return self._stream.record_event()

    def maximum(self, values: torch.Tensor) -> None:
        """Replace `values`, contiguous float32 on this GPU, by their maximum over all members.

        Raises:
            TransferTimeout, EngineLost: naming the members.
        """
        others = [n for n in range(len(self._names)) if n != self._number]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        address, stream = ctypes.c_void_p(values.data_ptr()), self._stream.cuda_stream
        with torch.cuda.device(self._device):
            with self._calling:
                status = _nccl().ncclAllReduce(
                    address, address, values.numel(), _FLOAT32, _MAX, self._alive(), stream
                )
            self._settle(status, others, "join in a maximum")
            self.wait(self._stream.record_event(), others, "join in a maximum")

    def fence(self, ticket: torch.cuda.Event) -> None:
        """See `Group`."""
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def wait(self, ticket: torch.cuda.Event, peers: Sequence[int], verb: str) -> None:
        """See `Group`; a communicator that fails, or is late, is aborted."""
        self._until(lambda: ticket.query() or self._failed(), peers, verb)
        self._raise_failure(peers)

    def close(self) -> None:
        """Abort the communicator."""
        with self._calling:
            comm, self._comm = self._comm, None
            if comm:
                with torch.cuda.device(self._device):
                    _nccl().ncclCommAbort(comm)

    def _alive(self) -> ctypes.c_void_p:
        if self._comm is None:
            raise EngineLost("the communicator was closed")
        return self._comm

    def _state(self) -> int:
        state = ctypes.c_int()
        with self._calling:
            status = _nccl().ncclCommGetAsyncError(self._alive(), ctypes.byref(state))
        return int(status or state.value)

    def _failed(self) -> bool:
        return self._state() not in (_SUCCESS, _IN_PROGRESS)

    def _settle(self, status: int, peers: Sequence[int], verb: str) -> None:
        """Wait until NCCL has done in the background what it was asked for."""
        if status not in (_SUCCESS, _IN_PROGRESS):
            self._lost(status, peers)
        self._until(lambda: self._state() != _IN_PROGRESS, peers, verb)
        self._raise_failure(peers)

    def _until(self, done: Callable[[], bool], peers: Sequence[int], verb: str) -> None:
        ends = time.monotonic() + self._timeout_s
        with waiting():
            while not done():
                if time.monotonic() > ends:
                    self.close()
                    text = f"{self._who(peers)} did not {verb} within {self._timeout_s:g} s"
                    raise TransferTimeout(text)
                time.sleep(_POLL_S)

    def _raise_failure(self, peers: Sequence[int]) -> None:
        state = self._state()
        if state not in (_SUCCESS, _IN_PROGRESS):
            self._lost(state, peers)

    def _lost(self, status: int, peers: Sequence[int]) -> None:
        text = _explain(status)
        self.close()
        raise EngineLost(f"NCCL lost its connection to {self._who(peers)}: {text}")

    def _who(self, peers: Sequence[int]) -> str:
        return ", ".join(self._names[peer] for peer in sorted(set(peers)))


@cache
def _nccl() -> Any:
    """The NCCL that torch has loaded."""
    torch.cuda.init()
    library = ctypes.CDLL("libnccl.so.2")
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    message: list[Any] = [pointer, ctypes.c_size_t, integer, integer, pointer, pointer]
    for call in (library.ncclSend, library.ncclRecv):
        call.argtypes = message
    library.ncclAllReduce.argtypes = [pointer, *message]
    library.ncclCommInitRankConfig.argtypes = [pointer, integer, _UniqueId, integer, pointer]
    library.ncclCommGetAsyncError.argtypes = [pointer, pointer]
    library.ncclCommAbort.argtypes = [pointer]
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def _explain(status: int) -> str:
    text = _nccl().ncclGetErrorString(status)
    return f"{text.decode() if text else 'unknown'} (NCCL error {status})"


def _check(status: int, what: str) -> None:
    if status:
        raise Fp8SyncError(f"{what} failed: {_explain(status)}")
