"""One trainer rank's share of a refit, written straight into the engine's staging memory.

A few launches per engine worker quantize, cast and copy everything to where it belongs, count NaN and
Inf, and digest what they wrote. No send buffer, no copy on the engine's GPU, no host work per tensor.
"""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import Fp8SyncError
from fp8sync.plan import in_parts
from fp8sync.sending.share import Sent, Told, Written, named_error
from fp8sync.transport.memory import ExportedMemory, MappedMemory
from fp8sync.waiting import device_work, waiting
from fp8sync.wire.payload import PartReport
from fp8sync.wire.tables import write_table
from fp8sync_kernels import Table, run_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8sync.plan import Copy
    from fp8sync.sending.share import Share
    from fp8sync.transport import Choice
    from fp8sync.wire.payload import Storages

__all__ = ["PARTS", "StagingPlace", "Writer"]


@dataclass(frozen=True)
class StagingPlace:
    """One worker's staging memory: the allocation, and where each storage begins in it (bytes)."""

    memory: ExportedMemory
    offsets: Mapping[str, int]


PARTS = 8
"""A share is written in so many launches per worker, so that the worker verifies one part while the next
is written: what is not hidden is the last part, which a GPU reads ten times faster than it arrives."""


@dataclass
class _Target:
    """One worker's share: its parts, their tables, and counters that lie where the host can read."""

    rank: int
    parts: list[tuple[Copy, ...]]
    mapped: MappedMemory
    offsets: Mapping[str, int]
    counters: list[torch.Tensor]
    seen: list[torch.Tensor]
    tables: list[Table | None]


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
        self._device = next(iter(storages.values())).device
        self._pointers: dict[str, int] = {}
        on_gpu = self._device.type == "cuda"
        self._targets, self._bytes = [], 0
        # Every rank begins with another worker: no two write to one at the same time for long.
        order = list(places)
        first = share.rank % max(len(order), 1)
        for engine_rank in order[first:] + order[:first]:
            place = places[engine_rank]
            copies = [c for c in share.plan.to_rank(engine_rank) if c.source_rank == share.rank]
            parts = in_parts(copies, PARTS)
            counters = [
                torch.zeros(2, len(p), dtype=torch.int64, device=self._device) for p in parts
            ]
            seen = [torch.zeros(2, len(p), dtype=torch.int64, pin_memory=on_gpu) for p in parts]
            mapped = MappedMemory(place.memory, self._device)
            self._targets.append(
                _Target(engine_rank, parts, mapped, place.offsets, counters, seen, [None] * PARTS)
            )
            self._bytes += sum(c.weight_bytes + c.scale_bytes for c in copies)
        self._prepare(storages)

    @classmethod
    def open(cls, choice: Choice, shares: Sequence[Share]) -> list[Writer]:
        """Map every worker's staging memory, once more for each portion: CUDA counts mappings."""
        places = {
            int(rank): StagingPlace(ExportedMemory(**place["memory"]), place["offsets"])
            for rank, place in choice["places"]
        }
        return [cls(share, places) for share in shares]

    def send(self, version: int, told: Told) -> Sent:  # noqa: ARG002  (staging knows one version)
        """Write the weights as they are now; never raises, so that the vote always takes place."""
        sent = Sent(self._rank)
        began = time.perf_counter()
        number = 0
        try:
            self._prepare(self._share.read())
            written = [self._launch(part) for part in range(PARTS)]
            for event in written:
                if event is not None:
                    with waiting():
                        event.synchronize()
                told(self._digests(number))
                number += 1
            for target in self._targets:
                for copies, seen in zip(target.parts, target.seen, strict=True):
                    for slot in seen[1].nonzero().flatten().tolist():
                        sent.parts.append(PartReport(copies[slot].tensor, int(seen[1, slot])))
            sent.bytes = self._bytes
        # Whatever stops writing, the workers that wait have to hear of it.
        except Exception as error:  # noqa: BLE001
            sent.error = named_error(error, self._rank)
            for _ in range(number, PARTS):
                told(None)
        sent.quantize_s = time.perf_counter() - began
        return sent

    def _launch(self, part: int) -> torch.cuda.Event | None:
        """Enqueue a part to every worker; the event follows its counters to the host."""
        for target in self._targets:
            table, counters = target.tables[part], target.counters[part]
            if table is not None:
                counters.zero_()
                with device_work(self._device):
                    run_table(table, *counters)
                target.seen[part].copy_(counters, non_blocking=True)
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_stream(self._device).record_event()

    def _digests(self, part: int) -> Written:
        return {
            target.rank: base64.b64encode(target.seen[part][0].numpy().tobytes()).decode()
            for target in self._targets
        }

    def close(self) -> None:
        """Unmap the workers' memory."""
        for target in self._targets:
            target.mapped.close()
        self._targets = []

    def _prepare(self, storages: Storages) -> None:
        """Build the tables, unless the weights still lie where they lay."""
        pointers = {name: t.data_ptr() for name, t in storages.items()}
        if pointers == self._pointers:
            return
        devices = {t.device for t in storages.values()}
        if len(devices) != 1:
            raise Fp8SyncError(f"expected weights on one device, found {sorted(map(str, devices))}")
        dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in storages.items()}
        for target in self._targets:
            for number, copies in enumerate(target.parts):
                if copies:
                    target.tables[number] = write_table(
                        copies,
                        lambda name: (pointers[name], dtypes[name]),
                        lambda name, t=target: t.mapped.address + t.offsets[name],  # type: ignore[misc]
                        self._device,
                        self._share.exchange.amax,
                    )
        self._pointers = pointers
