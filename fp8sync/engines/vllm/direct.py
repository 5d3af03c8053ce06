"""The `direct` strategy: staged bytes copied into the live storages, all of a worker's in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8sync_kernels import Table, build_table, compile_ahead, job, run_table

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch

__all__ = ["DirectInstall"]


class DirectInstall:
    """Copies modules that were proven to hold staged bytes as they are; built once for a link.

    Args:
        model: the live vLLM model.
        modules: names of the modules.
        staging: staged tensors by storage name; their memory is kept across versions.
        device: the worker's device.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        modules: Collection[str],
        staging: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        jobs = []
        self.nbytes = 0
        for storage, staged in staging.items():
            prefix, _, local = storage.rpartition(".")
            if prefix in modules:
                live = getattr(model.get_submodule(prefix), local)
                flat = staged.detach().reshape(-1), live.detach().reshape(-1)
                jobs.append(job.copy(*flat))
                self.nbytes += staged.numel() * staged.element_size()
        self._table: Table | None = build_table(jobs, device) if jobs else None
        if self._table is not None:
            compile_ahead(self._table, digests=False, nonfinite=False)

    def commit(self) -> None:
        """Copy, on the current stream."""
        if self._table is not None:
            run_table(self._table, None, None)
