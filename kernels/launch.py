"""Running a table: the Triton kernel on a GPU, the PyTorch reference elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fp8sync_kernels.descriptor import DIVISION, Path

if TYPE_CHECKING:
    from fp8sync_kernels.table import Table

# To quantize at the speed of memory, four programs must share a multiprocessor. Four warps of at most
# 128 registers do, without spilling. Divisions and fp32 sources need more registers than that, and
# tables of copies alone want more warps.
_LEAN = {"num_warps": 4, "maxnreg": 128}
_RICH = {"num_warps": 8}
_WANTS_LEAN = Path.WIDE_BF16 | Path.WIDE_FP16
_NEEDS_RICH = DIVISION | Path.WIDE_FP32

_COMPILED: dict[tuple[object, ...], Any] = {}


def run_table(
    table: Table,
    digests: torch.Tensor | None,
    nonfinite: torch.Tensor | None,
    *,
    programs: int | None = None,
) -> None:
    """Do everything that a table lists; on a GPU as one launch on the current stream.

    Args:
        table: on the device that works.
        digests: int64 ``[>= table.slots]`` on that device. The digest of what each job wrote is
            added (modulo 2^64) to its slot, so clear it first. None: no digests (canonical rows
            then do nothing).
        nonfinite: int64 ``[>= table.slots]``, likewise the number of NaN and infinite elements that
            the job's source holds. Copies are not examined. None: the caller knows that everything
            is finite.
        programs: number of persistent programs; None: one for each block.

    After the first launch of a set of paths (which compiles) a launch allocates nothing and does
    not synchronize: it may be captured in a CUDA graph.

    Raises:
        ValueError: digests or nonfinite are too short.
    """
    for counters in (digests, nonfinite):
        if counters is not None and counters.numel() < table.slots:
            raise ValueError(
                f"{counters.numel()} counters given, the table has {table.slots} slots"
            )
    if table.blocks == 0:
        return
    if table.rows.device.type != "cuda":
        from fp8sync_kernels.reference.table import run_table_reference

        run_table_reference(table, digests, nonfinite)
        return
    with torch.cuda.device(table.rows.device):
        launch_kernel(table, digests, nonfinite, programs=programs)


def compile_options(paths: int) -> dict[str, int]:
    """Warps and registers for a table's set of paths."""
    return _LEAN if paths & _WANTS_LEAN and not paths & _NEEDS_RICH else _RICH


def launch_kernel(
    table: Table,
    digests: torch.Tensor | None,
    nonfinite: torch.Tensor | None,
    *,
    programs: int | None = None,
) -> None:
    """The launch itself, on the current device and stream (or in Triton's interpreter)."""
    loop = programs is not None and programs < table.blocks
    grid = (programs if loop else table.blocks, 1, 1)
    tensors = (table.rows, table.block_row, digests, nonfinite)
    # What Triton specializes on. Its own search for the compiled kernel takes the host longer than
    # everything else together, as it compares every constant that the kernels refer to.
    kinds = tuple(None if t is None else t.data_ptr() % 16 == 0 for t in tensors)
    key = (table.rows.device, table.paths, loop, kinds)
    kernel = _COMPILED.get(key)
    if kernel is not None:
        kernel[grid](*tensors, table.blocks, table.paths, loop)
        return
    from fp8sync_kernels.gpu.bucket import bucket_kernel

    kernel = bucket_kernel[grid](
        *tensors,
        table.blocks,
        PATHS=table.paths,
        LOOP=loop,
        **compile_options(table.paths),
    )
    if kernel is not None:  # None: interpreted
        _COMPILED[key] = kernel
