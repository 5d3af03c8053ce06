"""The columns of a descriptor row as compile-time constants. Meanings: fp8sync_kernels.descriptor."""

from __future__ import annotations

import triton.language as tl

from fp8sync_kernels.descriptor import COLUMNS, Column

ROW_LENGTH = tl.constexpr(COLUMNS)
SOURCE = tl.constexpr(int(Column.SOURCE))
SOURCE_STRIDE = tl.constexpr(int(Column.SOURCE_STRIDE))
ROWS = tl.constexpr(int(Column.ROWS))
COLS = tl.constexpr(int(Column.COLS))
DESTINATION = tl.constexpr(int(Column.DESTINATION))
DESTINATION_STRIDE = tl.constexpr(int(Column.DESTINATION_STRIDE))
SCALE_INV = tl.constexpr(int(Column.SCALE_INV))
SCALE_STRIDE = tl.constexpr(int(Column.SCALE_STRIDE))
AMAX = tl.constexpr(int(Column.AMAX))
AMAX_STRIDE = tl.constexpr(int(Column.AMAX_STRIDE))
ROW_ORIGIN = tl.constexpr(int(Column.ROW_ORIGIN))
COL_ORIGIN = tl.constexpr(int(Column.COL_ORIGIN))
OP = tl.constexpr(int(Column.OP))
SLOT = tl.constexpr(int(Column.SLOT))
DIGEST_BASE = tl.constexpr(int(Column.DIGEST_BASE))
DIGEST_PITCH = tl.constexpr(int(Column.DIGEST_PITCH))
SCALE_DIGEST_BASE = tl.constexpr(int(Column.SCALE_DIGEST_BASE))
SCALE_DIGEST_PITCH = tl.constexpr(int(Column.SCALE_DIGEST_PITCH))
PATH = tl.constexpr(int(Column.PATH))
SOURCE_DTYPE = tl.constexpr(int(Column.SOURCE_DTYPE))
DESTINATION_DTYPE = tl.constexpr(int(Column.DESTINATION_DTYPE))
FIRST_BLOCK = tl.constexpr(int(Column.FIRST_BLOCK))
BLOCK_COLS = tl.constexpr(int(Column.BLOCK_COLS))
