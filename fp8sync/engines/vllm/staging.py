"""Where bytes land while the engine goes on serving: one allocation per worker.

On a GPU it is made when vLLM creates the backend, before it sizes its KV cache, and kept: writers of
other processes map it. On the processor every version gets fresh memory, because kernels may keep what
they processed.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from fp8sync.errors import CorruptBucket, Fp8SyncError, InstallFailed
from fp8sync.plan import DEFAULT_BUCKET_BYTES
from fp8sync.sending.writer import as_written
from fp8sync.transport.memory import ExportedMemory, allocate, export_memory
from fp8sync.wire.tables import check_table
from fp8sync_kernels import Table, compile_ahead, run_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8sync.engines.vllm.storage import StorageSpec
    from fp8sync.plan import Copy

__all__ = ["Expected", "Staging", "reserved_bytes"]

_ALIGN = 256
_MISC_BYTES = 1 << 20


def reserved_bytes(model: torch.nn.Module, commit: str) -> int:
    """Return the staging memory to reserve before vLLM sizes its KV cache.

    For `staged` that of all parameters in load form, with room for the misc path; all scale_inv of
    blockwise FP8, once more, are 1/4096 of the codes. For `in-place` a bucket of the default size, or the
    largest module.

    Raises:
        ValueError: another `commit`.
    """
    if commit not in {"staged", "in-place"}:
        raise ValueError(f"unknown fp8sync commit {commit!r} of an engine; known: staged, in-place")
    sizes = [
        sum(
            _aligned(tensor.numel() * tensor.element_size())
            for tensor in get_layerwise_info(module).restore_metadata[0].values()
        )
        for module in model.modules()
    ]
    if commit == "in-place":
        return max(DEFAULT_BUCKET_BYTES, *sizes)
    total = _MISC_BYTES + sum(sizes)
    return total + total // 1024


class Staging:
    """One worker's staging memory.

    Args:
        device: where the model lives.
        nbytes: to allocate now; a layout that needs more, or another commit, allocates anew.

    Raises:
        InstallFailed: there is no memory for it; as `lay_out` and `views`.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._arena = self._allocate(nbytes)
        self._portions: Sequence[Mapping[str, StorageSpec]] = ()
        self._views: dict[int, dict[str, torch.Tensor]] = {}
        self.offsets: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._arena.numel()

    def lay_out(self, portions: Sequence[Mapping[str, StorageSpec]]) -> None:
        """Give every storage its place; portions of a version lie in the same memory, one by one."""
        self._portions, self._views, self.offsets = portions, {}, {}
        most = 0
        for specs in portions:
            used = 0
            for name, spec in specs.items():
                self.offsets[name] = used
                used += _aligned(spec.nbytes)
            most = max(most, used)
        if most > self.nbytes or (len(portions) > 1 and most < self.nbytes):
            self._arena = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            self._arena = self._allocate(most)

    def views(self, portion: int = 0) -> dict[str, torch.Tensor]:
        """Return a portion's storages as tensors over the staging memory, constants filled in.

        There are none in portions after the last that was laid out.
        """
        if self._device.type == "cpu":
            self._arena, self._views = self._allocate(self.nbytes), {}
        specs = self._portions[portion] if portion < len(self._portions) else {}
        if portion not in self._views:
            self._views[portion] = {name: self._view(name, spec) for name, spec in specs.items()}
        views = self._views[portion]
        for name, spec in specs.items():
            if spec.constants:
                spec.fill(views[name])
        return views

    def _allocate(self, nbytes: int) -> torch.Tensor:
        try:
            return allocate(nbytes, self._device)
        except (RuntimeError, Fp8SyncError) as error:  # torch's, CUDA's
            text = f"no {nbytes} bytes of staging memory on {self._device}: {error}"
            raise InstallFailed(text) from error

    def _view(self, name: str, spec: StorageSpec) -> torch.Tensor:
        start = self.offsets[name]
        flat = self._arena[start : start + spec.nbytes].view(spec.dtype)
        return flat.as_strided(spec.size, spec.strides, flat.storage_offset())

    def export(self) -> ExportedMemory:
        """Return what a writer on this host needs."""
        return export_memory(self._arena)

    def expect(self, copies: Sequence[Copy], rank: int) -> Expected:
        """Prepare to verify what each source rank writes of a portion; `rank` is this worker's."""
        base = self._arena.data_ptr()
        return Expected(copies, rank, lambda name: base + self.offsets[name], self._device)


class Expected:
    """The bytes of one portion, as trainers will write them.

    Writers decide how they cut their shares, so the tables of parts are cut in the first version.

    Args:
        copies: that arrive.
        rank: this worker's.
        locate: returns the address of a storage.
        device: the worker's.
    """

    def __init__(
        self,
        copies: Sequence[Copy],
        rank: int,
        locate: Callable[[str], int],
        device: torch.device,
    ) -> None:
        self._rank, self._device = rank, device
        self._runs: dict[int, list[Copy]] = defaultdict(list)
        for copy in as_written(copies):
            self._runs[copy.source_rank].append(copy)
        cpu = torch.device("cpu")
        self._wholes = {r: check_table(run, locate, cpu) for r, run in self._runs.items()}
        for whole in self._wholes.values():
            compile_ahead(whole.to(device), nonfinite=False)
        self._parts: dict[tuple[int, int, int], Table] = {}
        self.begin()

    def begin(self) -> None:
        """Expect a version from its first byte on."""
        self._verified = dict.fromkeys(self._runs, 0)

    def verify(self, written: Sequence[bytes]) -> None:
        """Compare digests, for each source rank of its next copies, with those of the bytes that are here.

        Raises:
            CorruptBucket: naming every tensor that differs.
        """
        copies: list[Copy] = []
        sent: list[np.ndarray] = []
        found: list[torch.Tensor] = []
        for source_rank, run in self._runs.items():
            digests = np.frombuffer(written[source_rank], dtype="<i8")
            first = self._verified[source_rank]
            own = run[first : first + len(digests)]
            self._verified[source_rank] = first + len(digests)
            if own:
                copies += own
                sent.append(digests[: len(own)])
                found.append(self._digests(source_rank, first, len(own)))
        if not copies:
            return
        theirs, ours = np.concatenate(sent), torch.cat(found).cpu().numpy()
        faults = [
            f"{copies[i].tensor}: engine rank {self._rank} expected digest {theirs[i]:#x} from "
            f"trainer rank {copies[i].source_rank}, found {ours[i]:#x}"
            for i in np.flatnonzero(theirs != ours)
        ]
        if faults:
            raise CorruptBucket("staged bytes are not the bytes that were written", faults)

    def end(self) -> None:
        """Check that each source rank has told of all its copies, and of no more.

        Raises:
            CorruptBucket: naming the ranks that have not.
        """
        faults = [
            f"engine rank {self._rank} expected {len(run)} digests from trainer rank {source_rank}, "
            f"found {self._verified[source_rank]}"
            for source_rank, run in self._runs.items()
            if self._verified[source_rank] != len(run)
        ]
        if faults:
            raise CorruptBucket("not all that was written is verified", faults)

    def _digests(self, source_rank: int, first: int, count: int) -> torch.Tensor:
        """Digest what `count` of a source rank's copies, from its `first` on, have left here."""
        key = source_rank, first, first + count
        if key not in self._parts:
            self._parts[key] = self._wholes[source_rank].part(*key[1:]).to(self._device)
        found = torch.zeros(count, dtype=torch.int64, device=self._device)
        run_table(self._parts[key], found, None)
        return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
