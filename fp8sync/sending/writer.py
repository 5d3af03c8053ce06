"""One trainer rank's share of a refit, written straight into the engine's staging memory.

A few launches quantize, cast and copy everything to where it belongs, count NaN and Inf, and digest what
they wrote. No send buffer, no copy on the engine's GPU; the host looks where each storage lies, no more.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import TransferTimeout
from fp8sync.plan import in_parts, strips
from fp8sync.sending.live import LiveTable
from fp8sync.sending.share import Sent, Told, named_error
from fp8sync.transport.memory import ExportedMemory, MappedMemory, gpu_id, reader_of
from fp8sync.waiting import device_work, waiting
from fp8sync.wire.payload import PartReport
from fp8sync.wire.tables import write_table
from fp8sync_kernels import compile_ahead, run_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np

    from fp8sync.plan import Copy
    from fp8sync.sending.share import Share
    from fp8sync.transport import Choice
    from fp8sync.wire.payload import Storages
    from fp8sync_kernels import Table

__all__ = ["PARTS", "StagingPlace", "Writer", "as_written"]


@dataclass(frozen=True)
class StagingPlace:
    """One worker's staging memory: the allocation, where each storage begins in it (bytes), and on which GPU."""

    memory: ExportedMemory
    offsets: Mapping[str, int]
    gpu: str = ""


PARTS = 7
"""A share is written in so many parts, a launch each. The first are small, as the host looks at a part's
storages while the GPU is at the one before; the last are, as workers verify a part while the next is written.
Either is some five times faster than writing, so each part is three times its smaller neighbour. On a worker's
own GPU verifying would take its time from writing, and the share is one part."""

LEAST_BYTES = 1 << 26
"""The smallest part has no less, since some 15 µs pass between launches: a small share has empty parts first."""

STRIP_BYTES = 1 << 24
"""Larger copies are cut, or one vocabulary would make the last part as large as it is."""


def as_written(copies: Iterable[Copy]) -> Iterator[Copy]:
    """Yield copies as they are written and verified: in strips (`plan.strips`)."""
    return strips(copies, STRIP_BYTES)


@dataclass
class _Part:
    """One launch, its digests and counts of NaN and Inf, and digests where the host can read them.

    Slot i is the i-th copy's; `digests` views those of each engine rank: empty, where it gets nothing of this part.
    `there` follows them to the host.
    """

    table: LiveTable
    counters: tuple[torch.Tensor, torch.Tensor]
    seen: torch.Tensor
    digests: dict[int, np.ndarray]
    there: torch.cuda.Event | None


class Writer:
    """Writes one source rank's copies to all engine workers of this host.

    Args:
        share: what to write; the weights are all on one device.
        places: staging memory of every engine rank.

    Raises:
        UnsupportedLayout: a copy that the kernels cannot express.
    """

    def __init__(self, share: Share, places: Mapping[int, StagingPlace]) -> None:
        self._share, self._rank = share, share.rank
        storages = share.source.storages()
        self._device = reader_of(storages)
        self._places = places
        self._mapped: dict[int, MappedMemory] = {}
        self._parts: list[_Part] = []
        try:
            for rank, place in places.items():
                self._mapped[rank] = MappedMemory(place.memory, self._device)
            self._lay_out(storages)
        except BaseException:
            self.close()
            raise

    def _lay_out(self, storages: Storages) -> None:
        """Cut the share into parts, and compile what writes them."""
        share, places = self._share, self._places
        # One worker after the other, each rank beginning with another: so no two are at one worker while a
        # third worker's link is idle. Ranks that change worker often would meet at every change.
        first = share.rank % max(len(places), 1)
        order = [*places][first:] + [*places][:first]
        own = [c for r in order for c in share.plan.to_rank(r) if c.source_rank == share.rank]
        self._bytes = sum(c.weight_bytes + c.scale_bytes for c in own)
        cut = self._cut = list(as_written(own))
        self._counters = torch.zeros(2, len(cut), dtype=torch.int64, device=self._device)
        on_gpu = self._device.type == "cuda"
        gpus = {places[c.destination_rank].gpu for c in own}
        beside = on_gpu and gpu_id(self._device) in gpus
        self._seen = torch.zeros(len(cut), dtype=torch.int64, pin_memory=on_gpu)
        self._any_nonfinite = torch.zeros((), dtype=torch.bool, pin_memory=on_gpu)
        self._counted = self._event()
        first = 0
        for copies in in_parts(cut, _sizes(0 if beside else self._bytes)):
            self._parts.append(self._part(copies, slice(first, first + len(copies))))
            first += len(copies)
        for part in self._parts:
            compile_ahead(part.table.at(storages))

    def _part(self, copies: tuple[Copy, ...], own: slice) -> _Part:
        ranks = [copy.destination_rank for copy in copies]
        seen = self._seen[own]
        views = dict.fromkeys(self._places, seen[:0].numpy())
        for rank, count in Counter(ranks).items():
            first = ranks.index(rank)
            views[rank] = seen[first : first + count].numpy()
        alike = self._share.exchange.alike
        table = LiveTable(copies, partial(self._table, copies), self._device, alike)
        counted, nonfinite = self._counters
        return _Part(table, (counted[own], nonfinite[own]), seen, views, self._event())

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event() if self._device.type == "cuda" else None

    @classmethod
    def open(cls, choice: Choice, shares: Sequence[Share]) -> list[Writer]:
        """Map every worker's staging memory, once more for each portion: CUDA counts mappings."""
        places = {
            int(rank): StagingPlace(
                ExportedMemory(**place["memory"]), place["offsets"], place["gpu"]
            )
            for rank, place in choice["places"]
        }
        writers = []
        with ExitStack() as opened:
            for share in shares:
                writers.append(cls(share, places))
                opened.callback(writers[-1].close)
            opened.pop_all()
        return writers

    def send(self, version: int, told: Told) -> Sent:  # noqa: ARG002  (staging knows one version)
        """Write the weights as they are now; never raises, so that the vote always takes place."""
        sent = Sent(self._rank)
        began = time.perf_counter()
        number = 0
        launched: _Part | None = None
        try:
            storages = self._share.read()
            self._counters.zero_()
            gpu = self._device.type == "cuda"
            stream = torch.cuda.current_stream(self._device) if gpu else None
            for part in self._parts:
                self._check_awaited()
                self._launch(part, storages, stream)
                launched = part
            # One question for all copies: their counts are another read of as much as their digests.
            self._any_nonfinite.copy_(self._counters[1].any(), non_blocking=True)
            _record(self._counted, stream)
            for part in self._parts:
                _wait(part.there)
                told({rank: view.tobytes() for rank, view in part.digests.items()})
                number += 1
            _wait(self._counted)
            sent.parts += self._nonfinite()
            sent.bytes = self._bytes
        # Whatever stops writing, the workers that wait have to hear of it.
        except Exception as error:  # noqa: BLE001
            sent.error = named_error(error, self._rank)
            with suppress(RuntimeError):  # of a GPU that is lost
                _wait(launched.there if launched else None)
            # From now on nothing more arrives in their memory.
            for _ in range(number, len(self._parts)):
                told(None)
        sent.quantize_s = time.perf_counter() - began
        return sent

    def _check_awaited(self) -> None:
        """Write nothing that workers may have given up: by then others may write to their memory."""
        if self._share.given_up():
            raise TransferTimeout(
                f"trainer rank {self._rank} was held up, and writes no more: rank 0 has left the link, or "
                f"this rank was told to send more than {self._share.timeout_s:g} s ago"
            )

    def _launch(self, part: _Part, storages: Storages, stream: torch.cuda.Stream | None) -> None:
        """Enqueue a part, and its digests to the host."""
        table = part.table.at(storages)
        with device_work(self._device):
            run_table(table, *part.counters)
        part.seen.copy_(part.counters[0], non_blocking=True)
        _record(part.there, stream)

    def _nonfinite(self) -> list[PartReport]:
        if not self._any_nonfinite:
            return []
        with waiting():
            counts = self._counters[1].tolist()
        return [PartReport(c.tensor, n) for c, n in zip(self._cut, counts, strict=True) if n]

    def close(self) -> None:
        """Unmap the workers' memory."""
        for mapped in self._mapped.values():
            mapped.close()
        self._mapped, self._parts = {}, []

    def _table(self, copies: tuple[Copy, ...], source: Callable[[str], tuple[int, str]]) -> Table:
        amax = self._share.exchange.amax
        return write_table(copies, source, self._locate, self._device, amax)

    def _locate(self, engine_rank: int, storage: str) -> int:
        return self._mapped[engine_rank].address + self._places[engine_rank].offsets[storage]


def _record(event: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> None:
    if event is not None:
        event.record(stream)


def _wait(event: torch.cuda.Event | None) -> None:
    if event is not None:
        with waiting():
            event.synchronize()


def _sizes(nbytes: int) -> list[int]:
    """What the parts of a share of `nbytes` are to one another: 1, 3, 9, 27, 9, 3, 1, or less of it."""
    for most in range(PARTS // 2, -1, -1):
        sizes = [3 ** min(n, 2 * most - n) for n in range(2 * most + 1)]
        if nbytes >= LEAST_BYTES * sum(sizes):
            break
    return [0] * (PARTS - len(sizes)) + sizes
