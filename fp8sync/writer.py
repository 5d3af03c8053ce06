"""One trainer rank's share of a refit, written straight into the engine's staging memory.

One launch per engine worker quantizes, casts and copies everything to where it belongs, counts NaN and
Inf, and digests what it wrote. No send buffer, nothing on the engine's GPU, no host work per tensor.
"""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8sync.errors import Fp8SyncError
from fp8sync.payload import PartReport
from fp8sync.sender import Sent, named_error
from fp8sync.tables import write_table
from fp8sync.transport.memory import ExportedMemory, MappedMemory
from fp8sync_kernels import Table, run_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8sync.outgoing import Share
    from fp8sync.payload import Storages
    from fp8sync.plan import Copy
    from fp8sync.transport import Choice

__all__ = ["StagingPlace", "Writer"]


@dataclass(frozen=True)
class StagingPlace:
    """One worker's staging memory: the allocation, and where each storage begins in it (bytes)."""

    memory: ExportedMemory
    offsets: Mapping[str, int]


@dataclass
class _Target:
    """One worker's share: its copies, its table and their counters."""

    rank: int
    copies: tuple[Copy, ...]
    mapped: MappedMemory
    offsets: Mapping[str, int]
    digests: torch.Tensor
    nonfinite: torch.Tensor
    nbytes: int
    table: Table | None = None


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
        self._targets = []
        for engine_rank, place in places.items():
            copies = tuple(
                c for c in share.plan.to_rank(engine_rank) if c.source_rank == share.rank
            )
            zeros = torch.zeros(2, max(len(copies), 1), dtype=torch.int64, device=self._device)
            mapped = MappedMemory(place.memory, self._device)
            nbytes = sum(c.weight_bytes + c.scale_bytes for c in copies)
            self._targets.append(
                _Target(engine_rank, copies, mapped, place.offsets, zeros[0], zeros[1], nbytes)
            )
        self._prepare(storages)

    @classmethod
    def open(cls, choice: Choice, share: Share) -> Writer:
        """Map every worker's staging memory."""
        places = {
            int(rank): StagingPlace(ExportedMemory(**place["memory"]), place["offsets"])
            for rank, place in choice["places"]
        }
        return cls(share, places)

    def send(self, version: int) -> Sent:  # noqa: ARG002  (staging knows one version at a time)
        """Write the weights as they are now; never raises, so that the vote always takes place."""
        sent = Sent(self._rank)
        began = time.perf_counter()
        try:
            self._prepare(self._share.read())
            for target in self._targets:
                if target.table is not None:
                    target.digests.zero_()
                    target.nonfinite.zero_()
                    run_table(target.table, target.digests, target.nonfinite)
            for target in self._targets:
                written = target.digests[: len(target.copies)].cpu().numpy().tobytes()
                sent.digests[target.rank] = base64.b64encode(written).decode()
                found = target.nonfinite[: len(target.copies)]
                for slot in found.nonzero().flatten().tolist():
                    name = target.copies[slot].tensor
                    sent.parts.append(PartReport(name, int(found[slot])))
                sent.bytes += target.nbytes
        # Whatever stops writing, the workers that wait have to hear of it.
        except Exception as error:  # noqa: BLE001
            sent.error = named_error(error, self._rank)
        sent.quantize_s = time.perf_counter() - began
        return sent

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
            if target.copies:
                target.table = write_table(
                    target.copies,
                    lambda name: (pointers[name], dtypes[name]),
                    lambda name, t=target: t.mapped.address + t.offsets[name],  # type: ignore[misc]
                    self._device,
                    self._share.exchange.amax,
                )
        self._pointers = pointers
