"""The engine's side of `golden`: put every tensor together, quantize it whole, cut out our boxes."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from fp8sync.engines.vllm.intake import Faults
from fp8sync.errors import PeerFailed
from fp8sync.plan.boxes import block_shape, touched_blocks
from fp8sync.plan.build import to_fill
from fp8sync.recipe import Encoding
from fp8sync.sending.golden import digest_of, join_group, pieces_of
from fp8sync.wire.header import ABORT, HEADER_BYTES, Header
from fp8sync.wire.payload import Storages, infinite_in, view
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
        for box in to_fill(intake.wanted.ranks[intake.rank], intake.plan.tensors):
            self._boxes[box.tensor].append(box)

    @classmethod
    def open(cls, choice: Choice, intakes: Sequence[Intake]) -> list[GoldenReceiver]:
        """Join the group of an invitation; a version has one portion."""
        (intake,) = intakes
        with ExitStack() as joined:
            group, device = join_group(choice, intake.device, intake.channel.timeout_s)
            joined.callback(group.close)
            receiver = cls(intake, group, device)
            joined.pop_all()
        return [receiver]

    def receive(self, version: int, staged: Storages) -> None:
        """Take every message off the wire; stage tensor by tensor until something is wrong."""
        faults = Faults()
        try:
            for name, pieces in self._pieces.items():
                self._receive(name, pieces, version, staged, faults)
        # A trainer rank is late, or gone, or there is no room for a message even so.
        except Exception as error:  # noqa: BLE001
            faults.add(error)
        faults.settle()

    def forward(self, version: int, staged: Storages) -> None:
        """Nothing is forwarded: every tensor goes to every worker."""

    def close(self) -> None:
        """Leave the group; a `receive` under way ends with an error."""
        self._group.close()

    def _receive(
        self, name: str, pieces: Sequence[Piece], version: int, staged: Storages, faults: Faults
    ) -> None:
        """Take one tensor, and stage it unless something is wrong: then it is only taken off the wire."""
        payloads: list[torch.Tensor] = []
        for piece in pieces:
            message = self._take(piece, payloads, faults)
            if faults:
                continue
            try:
                self._check(piece, message, version)
                payloads.append(message[HEADER_BYTES:])
            # The senders wait for every message to be taken.
            except Exception as error:  # noqa: BLE001
                faults.add(error)
        if faults or not self._boxes[name]:
            return
        try:
            self._stage(name, self._as_wanted(name, self._joined(name, payloads)), staged)
        except Exception as error:  # noqa: BLE001
            faults.add(error)

    def _take(self, piece: Piece, payloads: list[torch.Tensor], faults: Faults) -> torch.Tensor:
        try:
            message = self._room(piece)
        except Exception as error:  # noqa: BLE001
            faults.add(error)
            payloads.clear()  # which makes room
            message = self._room(piece)
        ticket = self._group.exchange([], [(message, piece.rank)])
        self._group.wait(ticket, [piece.rank], "send a tensor")
        return message

    def _room(self, piece: Piece) -> torch.Tensor:
        size = HEADER_BYTES + piece.nbytes
        return torch.empty(size, dtype=torch.uint8, device=self._message_device)

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
            values, decoded = whole, scales is not None and box.scale_at is None
            if scales is not None and decoded:
                values = dequantize_blockwise(whole, scales, target.dtype)
            target.copy_(_cut(values, box.start, box.shape))
            bad = 0
            # The sender looks at what it sends, and a smaller dtype may be too small for that.
            if decoded or target.dtype != values.dtype:
                bad = int((~target.isfinite()).sum())
            if bad:
                raise infinite_in(target.dtype, {name: bad}, self._intake.rank)
            if scales is not None and box.scale_at is not None:
                blocks = touched_blocks((box.start, box.shape))
                view(staged, box.scale_at, blocks[1]).copy_(_cut(scales, *blocks))


def _cut(tensor: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
