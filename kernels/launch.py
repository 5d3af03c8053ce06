"""Running a table: the Triton kernel on a GPU, the PyTorch reference elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fp8sync_kernels.descriptor import COLUMNS, DIVISION, Path

if TYPE_CHECKING:
    from fp8sync_kernels.table import Table

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
            the job's source holds, of `cast` those that it writes; `copy` does not examine what it
            moves. None: the caller knows that everything is finite.
        programs: number of persistent programs; None: one for each block.

    After the first launch of a set of paths (which compiles) a launch allocates nothing and does
    not synchronize: it may be captured in a CUDA graph.

    Raises:
        TypeError: digests or nonfinite are not int64, or on another device than the table.
        ValueError: they are too short, or not contiguous; or `programs` is less than 1.

    Examples:
        >>> from fp8sync_kernels import build_table, digest
        >>> from fp8sync_kernels.job import Part, copy, quantize
        >>> x, norm = torch.ones(256, 384), torch.ones(384)
        >>> weight, scale_inv = torch.empty(256, 384, dtype=torch.uint8), torch.empty(2, 3)
        >>> bucket = torch.empty(4 * 384, dtype=torch.uint8)
        >>> jobs = [quantize(x, "pow2", weight, scale_inv, Part(0)), copy(norm, bucket, Part(1))]
        >>> table = build_table(jobs, x.device)
        >>> digests, nonfinite = torch.zeros(2, table.slots, dtype=torch.int64)
        >>> run_table(table, digests, nonfinite)
        >>> nonfinite.tolist(), digests[1].item() % 2**64 == digest(bucket)
        ([0, 0], True)
    """
    for counters in (digests, nonfinite):
        if counters is not None:
            _check(counters, table)
    if programs is not None and programs < 1:
        raise ValueError(f"{programs} programs do nothing")
    if table.blocks == 0:
        return
    if table.rows.device.type != "cuda":
        from fp8sync_kernels.reference.table import run_table_reference

        run_table_reference(table, digests, nonfinite)
        return
    with _on(table.rows.device):
        launch_kernel(table, digests, nonfinite, programs=programs)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one; where it is, that would still take as long as half a launch."""
    here = device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(device)


def _check(counters: torch.Tensor, table: Table) -> None:
    device = table.rows.device
    if counters.dtype != torch.int64 or counters.device != device:
        raise TypeError(
            f"counters are {counters.dtype} on {counters.device}, expected torch.int64 on {device}"
        )
    if counters.numel() < table.slots or not counters.is_contiguous():
        raise ValueError(
            f"counters have shape {tuple(counters.shape)} and strides {counters.stride()}, "
            f"the table has {table.slots} slots, one after the other"
        )


def compile_options(paths: int, one_row: bool = False) -> dict[str, int]:
    """Warps and registers for a table's set of paths.

    What decides is how many blocks a multiprocessor has in flight, without spilling: five of 16-bit
    sources, four where no row is looked up, three of fp32. Of many sizes tried, these were the fastest
    on an H200. The code for sources of several dtypes needs more registers, and has fewer blocks. Codes
    are only read: there the number of instructions decides, which for two warps is smaller than for four.
    """
    wide = paths & (Path.WIDE_BF16 | Path.WIDE_FP16 | Path.WIDE_FP32)
    several = wide & (wide - 1)
    if wide & Path.WIDE_FP32:
        return {"num_warps": 4, "maxnreg": 248 if several else 168}
    if wide:
        return {"num_warps": 4, "maxnreg": 168 if several else 104 if one_row else 96}
    if paths & Path.WIDE_CODES:
        return {"num_warps": 2 if paths % DIVISION == Path.WIDE_CODES else 4, "maxnreg": 128}
    return {"num_warps": 8}


def compile_ahead(table: Table, *, digests: bool = True, nonfinite: bool = True) -> None:
    """Compile and load the kernel that `run_table` launches for such a table, if it is on a GPU.

    Only the kinds of its jobs matter: a table of jobs like those that will come does as well. Nothing
    that it lists is read or written.

    Args:
        table: on the device that will work.
        digests: whether launches will have them.
        nonfinite: likewise.

    Examples:
        >>> from fp8sync_kernels import build_table
        >>> from fp8sync_kernels.job import copy
        >>> table = build_table([copy(torch.ones(128), None)], "cpu")
        >>> compile_ahead(table)  # no GPU: nothing to do
    """
    if table.blocks == 0 or table.rows.device.type != "cuda":
        return
    key = _key(table, digests=digests, nonfinite=nonfinite, loop=False)
    if key in _COMPILED:
        return
    with torch.cuda.device(table.rows.device):
        kernel = warm_up(table, digests=digests, nonfinite=nonfinite)
        kernel[(1, 1, 1)]  # loads it
    _COMPILED[key] = kernel


def warm_up(table: Table, *, digests: bool, nonfinite: bool) -> Any:
    """Compile for the current device what `launch_kernel` would; needs no memory of it."""
    from fp8sync_kernels.gpu.bucket import bucket_kernel

    one_row = _one_row(table)
    counters = (torch.int64 if digests else None, torch.int64 if nonfinite else None)
    types = (torch.int64, None if one_row else torch.int32, *counters)
    options = compile_options(table.paths, one_row)
    return bucket_kernel.warmup(
        *types, table.blocks, PATHS=table.paths, LOOP=False, grid=(1, 1, 1), **options
    )


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
    one_row = _one_row(table)
    tensors = (table.rows, None if one_row else table.block_row, digests, nonfinite)
    counted = {"digests": digests is not None, "nonfinite": nonfinite is not None}
    key = _key(table, **counted, loop=loop)
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
        **compile_options(table.paths, one_row),
    )
    if kernel is not None:  # None: interpreted
        _COMPILED[key] = kernel


def _key(table: Table, *, digests: bool, nonfinite: bool, loop: bool) -> tuple[object, ...]:
    """What Triton specializes on.

    Its own search for the compiled kernel takes the host longer than everything else together, as it
    compares every constant that the kernels refer to.
    """
    return table.rows.device, table.paths, _one_row(table), digests, nonfinite, loop


def _one_row(table: Table) -> bool:
    """Then no block looks its row up."""
    return table.rows.numel() == COLUMNS
