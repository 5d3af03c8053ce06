"""The descriptor table: one int64 row for each rectangle that a launch works on.

A launch takes a table, and nothing else says what it does: quantize, cast, copy, scatter and digest
rows may be mixed. `Column` is the layout of a row, `Op` what to do, `Path` which inner loop does it.
`fp8sync_kernels.job` writes rows from tensors or raw addresses; here are only the meanings.

A row describes a row-major rectangle whose elements are adjacent within a row (unit inner stride).
Addresses are bytes in the address space of the device that runs the launch: its own memory, a bucket
or a peer's memory mapped into it. Address 0 means "absent", and what is absent is not written.
"""

from __future__ import annotations

from enum import IntEnum

import torch


class Column(IntEnum):
    """Columns of a row, with their units; elements are those of that side's dtype column.

    The order is frozen: docs/wire-format.md has it.
    """

    SOURCE = 0  # address of the rectangle's first element
    SOURCE_STRIDE = 1  # elements from one row to the next
    ROWS = 2  # rows of the rectangle
    COLS = 3  # elements in a row of the source
    DESTINATION = 4  # address of codes, casts or copies; 0: digest only
    DESTINATION_STRIDE = 5  # elements from one row to the next
    SCALE_INV = 6  # address of float32 per block: written by quantize, read by CANONICAL
    SCALE_STRIDE = 7  # float32 values from one row of blocks to the next
    AMAX = 8  # address of float32 per block: written by AMAX, read by the *_GIVEN ops
    AMAX_STRIDE = 9  # float32 values from one row of blocks to the next
    ROW_ORIGIN = 10  # row of the rectangle's first element within its first block, 0..127
    COL_ORIGIN = 11  # column likewise
    OP = 12  # an Op
    PATH = 13  # a Path
    SOURCE_DTYPE = 14  # a Dtype
    DESTINATION_DTYPE = 15  # a Dtype
    SLOT = 16  # index into the launch's digests and nonfinite counts
    DIGEST_BASE = 17  # bytes: position of the first destination element within its digested part
    DIGEST_PITCH = 18  # bytes from one row to the next within that part
    SCALE_DIGEST_BASE = 19  # bytes: position of the first scale_inv within that part
    SCALE_DIGEST_PITCH = 20  # bytes from one row of blocks to the next within that part
    FIRST_BLOCK = 21  # number of blocks in all rows before this one
    BLOCK_COLS = 22  # blocks side by side in the rectangle
    RESERVED = 23  # 0; a row is 192 bytes


COLUMNS = len(Column)


class Op(IntEnum):
    """What is done to a rectangle."""

    POW2 = 0  # quantize by the formula of that name
    FP32 = 1
    POW2_GIVEN = 2  # the same with amax read from AMAX: blocks of which this is only a part
    FP32_GIVEN = 3
    AMAX = 4  # write each block's partial amax, nothing else
    CANONICAL = 5  # digest FP8 codes and scale_inv as if quantized anew by pow2; writes nothing
    COPY = 6  # move bytes
    CAST = 7  # convert between bf16, fp16 and fp32
    COPY_CODES = 8  # move FP8 codes and count the NaN among them
    COPY_BF16 = 9  # move elements of that type and count the NaN and infinities among them
    COPY_FP16 = 10
    COPY_FP32 = 11


class Dtype(IntEnum):
    """Element types of a side."""

    BYTES = 0
    BF16 = 1
    FP16 = 2
    FP32 = 3


class Path(IntEnum):
    """Inner loops, one bit each. A table's builder chooses; a launch compiles only those in use.

    WIDE: addresses, strides and widths allow 16-byte access (of the codes as well).
    """

    WIDE_BF16 = 1 << 0
    WIDE_FP16 = 1 << 1
    WIDE_FP32 = 1 << 2
    WIDE_CODES = 1 << 3
    ANY_BF16 = 1 << 4
    ANY_FP16 = 1 << 5
    ANY_FP32 = 1 << 6
    ANY_CODES = 1 << 7
    COPY_16 = 1 << 8
    COPY_4 = 1 << 9
    COPY_1 = 1 << 10
    CAST = 1 << 11


# Beside the paths in a table's bit set: some row's formula divides. The code of a division takes
# registers even where it is not run.
DIVISION = 1 << 12
# Some block of a wide path is not 128x128. Masks cost a third of all instructions.
CUT = 1 << 13
# Some row is a copy that counts.
COUNTED = 1 << 14

# Rows and columns, in elements, that one program handles on each path.
TILE_OF_PATH = {
    **{path: (128, 128) for path in Path if path < Path.COPY_16},
    Path.COPY_16: (32, 1024),
    Path.COPY_4: (8, 1024),
    Path.COPY_1: (8, 256),
    Path.CAST: (4, 256),
}

# The copies that count, by the elements that they do it for. To the rest of them, all are bytes.
DTYPE_COUNTED = {
    Op.COPY_CODES: torch.float8_e4m3fn,
    Op.COPY_BF16: torch.bfloat16,
    Op.COPY_FP16: torch.float16,
    Op.COPY_FP32: torch.float32,
}

DTYPE_OF_TORCH = {
    torch.uint8: Dtype.BYTES,
    torch.float8_e4m3fn: Dtype.BYTES,
    torch.bfloat16: Dtype.BF16,
    torch.float16: Dtype.FP16,
    torch.float32: Dtype.FP32,
}
TORCH_OF_DTYPE = {
    Dtype.BYTES: torch.uint8,
    Dtype.BF16: torch.bfloat16,
    Dtype.FP16: torch.float16,
    Dtype.FP32: torch.float32,
}
