"""Where bytes land while the engine goes on serving: one allocation per worker.

On a GPU it is made when vLLM creates the backend, before it sizes its KV cache, and kept: writers of
other processes map it. On the processor every version gets fresh memory, because kernels may keep what
they processed.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from fp8sync.errors import CorruptBucket
from fp8sync.plan import in_parts
from fp8sync.sending.writer import PARTS
from fp8sync.transport.memory import ExportedMemory, allocate, export_memory
from fp8sync.wire.tables import check_table
from fp8sync_kernels import Table, run_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8sync.engines.vllm.storage import StorageSpec
    from fp8sync.plan import Copy

__all__ = ["Staging", "load_form_bytes"]

_ALIGN = 256
_MISC_BYTES = 1 << 20


def load_form_bytes(model: torch.nn.Module) -> int:
    """Return the bytes that a model's parameters in load form take, with room for the misc path.

    All scale_inv of blockwise FP8, once more, are 1/4096 of the codes.
    """
    total = _MISC_BYTES
    for module in model.modules():
        for tensor in get_layerwise_info(module).restore_metadata[0].values():
            total += _aligned(tensor.numel() * tensor.element_size())
    return total + total // 1024


class Staging:
    """One worker's staging memory.

    Args:
        device: where the model lives.
        nbytes: to allocate now; more is allocated when a layout needs it.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._arena = allocate(nbytes, device)
        self._specs: Mapping[str, StorageSpec] = {}
        self.offsets: dict[str, int] = {}
        self._checks: list[list[tuple[int, Sequence[Copy], Table]]] = []
        self._rank = 0

    def lay_out(self, specs: Mapping[str, StorageSpec]) -> None:
        """Give every storage its place."""
        self._specs, self.offsets, self._checks = specs, {}, []
        used = 0
        for name, spec in specs.items():
            self.offsets[name] = used
            used += _aligned(spec.nbytes)
        if used > self._arena.numel():
            self._arena = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            self._arena = allocate(used, self._device)

    def views(self) -> dict[str, torch.Tensor]:
        """Return the storages as tensors over the staging memory, constants filled in."""
        if self._device.type == "cpu":
            self._arena = torch.empty_like(self._arena)
        views = {}
        for name, spec in self._specs.items():
            start = self.offsets[name]
            flat = self._arena[start : start + spec.nbytes].view(spec.dtype)
            views[name] = spec.fill(flat.as_strided(spec.size, spec.strides, flat.storage_offset()))
        return views

    def export(self) -> ExportedMemory:
        """Return what a writer on this host needs."""
        return export_memory(self._arena)

    def expect(self, copies: Sequence[Copy], rank: int) -> None:
        """Prepare to verify what each source rank writes, part by part; `rank` is this worker's."""
        base = self._arena.data_ptr()
        self._checks = [[] for _ in range(PARTS)]
        for source_rank in sorted({c.source_rank for c in copies}):
            own = [c for c in copies if c.source_rank == source_rank]
            for checks, part in zip(self._checks, in_parts(own, PARTS), strict=True):
                table = check_table(part, lambda name: base + self.offsets[name], self._device)
                checks.append((source_rank, part, table))
        self._rank = rank

    def verify(self, part: int, written: Sequence[str]) -> None:
        """Compare the digests of a part, by source rank, with those of the bytes that are here.

        Raises:
            CorruptBucket: naming every tensor that differs.
        """
        faults = []
        for source_rank, copies, table in self._checks[part]:
            found = torch.zeros(len(copies), dtype=torch.int64, device=self._device)
            run_table(table, found, None)
            sent = np.frombuffer(base64.b64decode(written[source_rank]), dtype="<i8")
            here = found.cpu().numpy()
            faults += [
                f"{copies[i].tensor}: engine rank {self._rank} expected digest {sent[i]:#x} from "
                f"trainer rank {source_rank}, found {here[i]:#x}"
                for i in np.flatnonzero(sent != here)
            ]
        if faults:
            raise CorruptBucket("staged bytes are not the bytes that were written", faults)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
