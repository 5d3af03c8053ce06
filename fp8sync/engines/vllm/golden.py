"""The engine's side of `golden`: put every tensor together, quantize it whole, cut out our boxes."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import Fp8SyncError, PeerFailed
from fp8sync.plan.boxes import block_shape, touched_blocks
from fp8sync.recipe import Encoding
from fp8sync.sending.golden import digest_of, join_group, pieces_of
from fp8sync.wire.header import ABORT, HEADER_BYTES, Header
from fp8sync.wire.payload import Storages, view
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8sync.engines.vllm.intake import Intake
    from fp8sync.manifest import Box
    from fp8sync.sending.golden import Piece
    from fp8sync.transport import Choice
    from fp8sync.transport.group import Group

__all__ = ["GoldenReceiver"]

Pair = tuple[torch.Tensor, torch.Tensor | None]
"""A whole tensor, and its scale_inv if it holds codes."""


class GoldenReceiver:
    """One worker's way in.

    Args:
        intake: what to receive, with the boxes of both sides.
        group: the transport; trainer ranks have their own ranks as numbers.
        device: where its messages lie.
    """

    def __init__(self, intake: Intake, group: Group, device: torch.device) -> None:
        self._intake, self._group, self._message_device = intake, group, device
        self._pieces = pieces_of(intake.held)
        self._plan = bytes.fromhex(intake.held.digest())[:16]
        self._boxes: dict[str, list[Box]] = defaultdict(list)
        for box in intake.wanted.ranks[intake.rank]:
            self._boxes[box.tensor].append(box)

    @classmethod
    def open(cls, choice: Choice, intakes: Sequence[Intake]) -> list[GoldenReceiver]:
        """Join the group of an invitation; a version has one portion."""
        (intake,) = intakes
        group, device = join_group(choice, intake.device, intake.channel.timeout_s)
        return [cls(intake, group, device)]

    def receive(self, version: int, staged: Storages) -> None:
        """Take every message off the wire; stage tensor by tensor until something is wrong."""
        failure: Fp8SyncError | None = None
        for name, pieces in self._pieces.items():
            payloads = []
            for piece in pieces:
                message = self._take(piece)
                try:
                    self._check(piece, message, version)
                except Fp8SyncError as error:
                    # What follows is taken off the wire, so that the senders are not left waiting.
                    failure = failure or error
                payloads.append(message[HEADER_BYTES:])
            if failure is None and self._boxes[name]:
                self._stage(name, self._as_wanted(name, self._joined(name, payloads)), staged)
        if failure is not None:
            raise failure

    def forward(self, version: int, staged: Storages) -> None:
        """Nothing is forwarded: every tensor goes to every worker."""

    def close(self) -> None:
        """Leave the group; a `receive` under way ends with an error."""
        self._group.close()

    def _take(self, piece: Piece) -> torch.Tensor:
        size = HEADER_BYTES + piece.nbytes
        message = torch.empty(size, dtype=torch.uint8, device=self._message_device)
        ticket = self._group.exchange([], [(message, piece.rank)])
        self._group.wait(ticket, [piece.rank], "send a tensor")
        return message

    def _check(self, piece: Piece, message: torch.Tensor, version: int) -> None:
        header = Header.unpack(bytes(message[:HEADER_BYTES].tolist()))
        if header.flags & ABORT:
            raise PeerFailed(f"trainer rank {piece.rank} stopped sending")
        value = digest_of(message[HEADER_BYTES:])
        where = (
            f"engine rank {self._intake.rank}, {piece.box.tensor} from trainer rank {piece.rank}"
        )
        header.check(piece.header(version, value, self._plan), where)

    def _joined(self, name: str, payloads: Sequence[torch.Tensor]) -> Pair:
        info = self._intake.held.tensors[name]
        dtype = getattr(torch, info.dtype)
        whole = torch.empty(info.shape, dtype=dtype, device=self._intake.device)
        scales = None
        if info.encoding is Encoding.BLOCKWISE:
            scales = torch.empty(
                block_shape(info.shape), dtype=torch.float32, device=self._intake.device
            )
        for piece, payload in zip(self._pieces[name], payloads, strict=True):
            rect = piece.box.start, piece.box.shape
            target = _cut(whole, *rect)
            elements = target.numel() * dtype.itemsize
            target.copy_(payload[:elements].view(dtype).view(target.shape))
            if scales is not None:
                blocks = _cut(scales, *touched_blocks(rect))
                blocks.copy_(payload[elements:].clone().view(torch.float32).view(blocks.shape))
        return whole, scales

    def _as_wanted(self, name: str, held: Pair) -> Pair:
        info = self._intake.plan.tensors[name]
        whole, scales = held
        sent = self._intake.held.tensors[name].formula
        if scales is not None and info.formula not in {None, sent}:
            whole, scales = dequantize_blockwise(whole, scales, torch.float32), None
        if info.encoding is Encoding.BLOCKWISE and scales is None and info.formula is not None:
            codes, scales, _ = quantize_blockwise(whole, info.formula.value)
            return codes, scales
        return whole, scales

    def _stage(self, name: str, wanted: Pair, staged: Storages) -> None:
        whole, scales = wanted
        for box in self._boxes[name]:
            target = view(staged, box.at, box.shape)
            values = whole
            if scales is not None and box.scale_at is None:
                values = dequantize_blockwise(whole, scales, target.dtype)
            target.copy_(_cut(values, box.start, box.shape))
            if scales is not None and box.scale_at is not None:
                blocks = touched_blocks((box.start, box.shape))
                view(staged, box.scale_at, blocks[1]).copy_(_cut(scales, *blocks))


def _cut(tensor: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
