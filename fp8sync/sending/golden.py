"""The plain way: every tensor whole to every engine worker, which quantizes it and cuts out its boxes.

Slow, and deliberately apart from all else: it looks at no copy of the plan, and quantizes by the
reference, on the receiving side. The other ways have to bring the same bytes; and where one of them is in
doubt, this one can be forced.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.plan.boxes import touched_blocks
from fp8sync.plan.formats import cut_pairs
from fp8sync.sending.alike import kept_in
from fp8sync.sending.share import Sent, Told, named_error
from fp8sync.transport.gloo import GlooGroup
from fp8sync.transport.memory import reader_of
from fp8sync.transport.nccl import NcclGroup
from fp8sync.wire.header import ABORT, HEADER_BYTES, Header
from fp8sync.wire.payload import STRIP_BYTES, PartReport, Storages, view
from fp8sync_kernels import build_table, digest, job, run_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8sync.manifest import Box, Manifest
    from fp8sync.sending.share import Share
    from fp8sync.transport import Choice
    from fp8sync.transport.group import Group

__all__ = ["GoldenSender", "Piece", "digest_of", "join_group", "pieces_of"]


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor that one trainer rank holds: one message."""

    index: int
    rank: int
    box: Box
    nbytes: int

    def header(self, version: int, value: int, plan: bytes, flags: int = 0) -> Header:
        """Return the header of its message; `value` is the payload's digest."""
        return Header(self.index, version, self.nbytes, value, plan, 1, flags)


def pieces_of(held: Manifest) -> dict[str, list[Piece]]:
    """Return what is sent, tensor by tensor, in the order in which everyone takes it.

    A rectangle that several ranks hold is sent by the first of them.

    Raises:
        UnsupportedLayout: FP8 pairs that are cut inside a block, or whose blocks are not the tensor's.
    """
    if faults := [f"{name}: {reason}" for name, reason in cut_pairs(held).items()]:
        raise UnsupportedLayout("golden cannot put these pairs together", faults)
    seen = set()
    boxes: dict[str, list[tuple[int, Box]]] = defaultdict(list)
    for rank, own in held.ranks.items():
        for box in own:
            key = box.tensor, box.start, box.shape
            if key in seen:
                continue
            seen.add(key)
            boxes[box.tensor].append((rank, box))
    found: dict[str, list[Piece]] = {}
    count = 0
    for name in held.tensors:
        found[name] = []
        for rank, box in boxes[name]:
            dtype = getattr(torch, held.tensors[name].dtype)
            nbytes = dtype.itemsize * torch.Size(box.shape).numel()
            if box.scale_at is not None:
                nbytes += 4 * torch.Size(touched_blocks((box.start, box.shape))[1]).numel()
            found[name].append(Piece(count, rank, box, nbytes))
            count += 1
    return found


def join_group(
    choice: Choice, device: torch.device, timeout_s: float
) -> tuple[Group, torch.device]:
    """Join the group of an invitation; return it, and where its messages have to lie."""
    if choice["carrier"] == "nccl":
        return NcclGroup.join(choice, device, timeout_s), device
    return GlooGroup.join(choice, timeout_s), torch.device("cpu")


def digest_of(payload: torch.Tensor) -> int:
    """Return the digest of a uint8 tensor, by one launch where it lies on a GPU."""
    if payload.device.type == "cpu":
        return digest(payload)
    value = torch.zeros(1, dtype=torch.int64, device=payload.device)
    run_table(build_table([job.copy(payload, None)], payload.device), value, None)
    return int(value) % (1 << 64)


class GoldenSender:
    """Sends every rectangle of which this rank is the first holder to every worker.

    Args:
        share: what to send, with the boxes of all trainer ranks.
        group: the transport.
        device: where its messages lie.
        workers: numbers of all workers in the group.
    """

    def __init__(
        self, share: Share, group: Group, device: torch.device, workers: list[int]
    ) -> None:
        self._share, self._group, self._device, self._workers = share, group, device, workers
        self._plan = bytes.fromhex(share.held.digest())[:16]
        pieces = [piece for found in pieces_of(share.held).values() for piece in found]
        self._pieces = [piece for piece in pieces if piece.rank == share.rank]
        self._names = kept_in(piece.box for piece in self._pieces)

    @classmethod
    def open(cls, choice: Choice, shares: Sequence[Share]) -> list[GoldenSender]:
        """Join the group of an invitation; a version has one portion."""
        (share,) = shares
        reader = reader_of(share.source.storages())
        workers = [number for _, number in choice["members"]]
        with ExitStack() as joined:
            group, device = join_group(choice, reader, share.timeout_s)
            joined.callback(group.close)
            sender = cls(share, group, device, workers)
            joined.pop_all()
        return [sender]

    def send(self, version: int, told: Told) -> Sent:  # noqa: ARG002  (headers have the digests)
        """Send the weights as they are now; never raises, so that the vote always takes place."""
        sent = Sent(self._share.rank)
        began = time.perf_counter()
        storages: Storages = {}
        try:
            storages = self._share.read(self._names)
        # Workers get every message all the same, marked void.
        except Exception as error:  # noqa: BLE001
            sent.error = named_error(error, self._share.rank)
        try:
            for number, piece in enumerate(self._pieces, 1):
                self._send(piece, version, storages, sent)
                self._share.progress(len(self._pieces) - number)
        except Exception as error:  # noqa: BLE001
            sent.error = sent.error or named_error(error, self._share.rank)
        sent.send_s = time.perf_counter() - began
        return sent

    def close(self) -> None:
        """Leave the group; a `send` under way ends with an error."""
        self._group.close()

    def _send(self, piece: Piece, version: int, storages: Storages, sent: Sent) -> None:
        message = self._message(piece, version, storages, sent)
        ticket = self._group.exchange([(message, n) for n in self._workers], [])
        self._group.wait(ticket, self._workers, "take a tensor")
        sent.bytes += message.numel() * len(self._workers)

    def _message(self, piece: Piece, version: int, storages: Storages, sent: Sent) -> torch.Tensor:
        """Return a piece's message; after a failure it is void."""
        if sent.error is None:
            try:
                return self._filled(piece, version, storages, sent)
            # Whatever it is, the workers that wait for a message have to hear of it.
            except Exception as error:  # noqa: BLE001
                sent.error = named_error(error, self._share.rank)
        return self._stamped(self._room(piece), piece.header(version, 0, self._plan, ABORT))

    def _filled(self, piece: Piece, version: int, storages: Storages, sent: Sent) -> torch.Tensor:
        message = self._room(piece)
        value = _pack(piece.box, storages, message[HEADER_BYTES:], sent)
        return self._stamped(message, piece.header(version, value, self._plan))

    def _room(self, piece: Piece) -> torch.Tensor:
        return torch.empty(HEADER_BYTES + piece.nbytes, dtype=torch.uint8, device=self._device)

    def _stamped(self, message: torch.Tensor, header: Header) -> torch.Tensor:
        message[:HEADER_BYTES] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
        return message


def _pack(box: Box, storages: Storages, payload: torch.Tensor, sent: Sent) -> int:
    """Fill a piece's payload, and note what is not finite; returns its digest."""
    x = view(storages, box.at, box.shape)
    elements = payload[: x.nbytes].view(x.dtype)
    elements.view(x.shape).copy_(x)
    if box.scale_at is not None:
        blocks = touched_blocks((box.start, box.shape))[1]
        scales = view(storages, box.scale_at, blocks).contiguous().view(-1)
        payload[x.nbytes :].copy_(scales.view(torch.uint8))  # at any byte
    if x.is_floating_point():
        bad = _nonfinite(elements)
        bad += 0 if box.scale_at is None else _nonfinite(scales)
        sent.parts.append(PartReport(box.tensor, bad))
    return digest_of(payload)


def _nonfinite(values: torch.Tensor) -> int:
    """Count NaN and Inf; some at a time, as FP8 is looked at in float32."""
    return sum(int((~torch.isfinite(some.float())).sum()) for some in values.split(STRIP_BYTES))
