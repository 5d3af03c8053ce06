# ruff: noqa: SIM102 - the outer tests are decided at compile time, the inner ones are not
"""Tiles of bytes moved or digested, and of floats converted. Reference: reference/table."""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.descriptor import Dtype, Op
from fp8sync_kernels.gpu.columns import (
    COLS,
    DESTINATION,
    DESTINATION_DTYPE,
    DESTINATION_STRIDE,
    DIGEST_BASE,
    DIGEST_PITCH,
    OP,
    ROWS,
    SLOT,
    SOURCE,
    SOURCE_DTYPE,
    SOURCE_STRIDE,
)
from fp8sync_kernels.gpu.digest import add_digest, element_terms, total, word_terms

DTYPE_BF16 = tl.constexpr(int(Dtype.BF16))
DTYPE_FP16 = tl.constexpr(int(Dtype.FP16))
OP_COPY = tl.constexpr(int(Op.COPY))
OP_COPY_CODES = tl.constexpr(int(Op.COPY_CODES))
OP_COPY_BF16 = tl.constexpr(int(Op.COPY_BF16))
OP_COPY_FP16 = tl.constexpr(int(Op.COPY_FP16))


@triton.jit
def copy_words(
    desc: tl.tensor,
    tile_row: tl.tensor,
    tile_col: tl.tensor,
    digests: tl.tensor,
    nonfinite: tl.tensor,
    WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COUNTED: tl.constexpr,
) -> None:
    """Move and digest 1024 bytes of each of 32 rows, all addresses and widths multiples of 16.

    Without WIDE: of 8 rows, multiples of 4. AT_ONCE: rows that are held in registers together.
    COUNTED: some rows of the table are copies that count.
    """
    LINES: tl.constexpr = 32 if WIDE else 8
    source = tl.load(desc + SOURCE).to(tl.pointer_type(tl.uint32))
    stride = tl.load(desc + SOURCE_STRIDE) >> 2
    cols = (tl.load(desc + COLS) >> 2).to(tl.int32)
    if WIDE:
        source = tl.multiple_of(source, 16)
        stride = tl.multiple_of(stride, 4)
        cols = tl.multiple_of(cols, 4)
    address = tl.load(desc + DESTINATION)
    col = tile_col * 256 + tl.arange(0, 256)
    value = tl.full([], 0, tl.uint64)
    count = tl.full([], 0, tl.int32)
    for start in range(0, LINES, AT_ONCE):
        row = tile_row * LINES + start + tl.arange(0, AT_ONCE)
        inside = (row < tl.load(desc + ROWS).to(tl.int32))[:, None] & (col < cols)[None, :]
        words = tl.load(source + row[:, None] * stride + col[None, :], mask=inside, other=0)
        if address != 0:
            destination = address.to(tl.pointer_type(tl.uint32))
            stride_out = tl.load(desc + DESTINATION_STRIDE) >> 2
            if WIDE:
                destination = tl.multiple_of(destination, 16)
                stride_out = tl.multiple_of(stride_out, 4)
            tl.store(destination + row[:, None] * stride_out + col[None, :], words, mask=inside)
        if COUNTED:
            if nonfinite is not None:
                if tl.load(desc + OP) != OP_COPY:
                    count += _not_finite(desc, words)
        if digests is not None:
            pitch = (tl.load(desc + DIGEST_PITCH) >> 2).to(tl.uint32)
            word_row = (tl.load(desc + DIGEST_BASE) >> 2).to(tl.uint32) + row.to(tl.uint32) * pitch
            value += total(word_terms(words, word_row[:, None] + col.to(tl.uint32)[None, :]))
    if digests is not None:
        add_digest(digests, tl.load(desc + SLOT), value)
    if COUNTED:
        _add_count(desc, nonfinite, count)


@triton.jit
def _not_finite(desc: tl.tensor, words: tl.tensor) -> tl.tensor:
    """Number of NaN and infinite elements of the row's type in uint32 [n, any], n below 64.

    Such an element has all bits of its exponent set (a code: all but its sign). Then 1 added to the
    lowest of them carries into the sign's place, which was cleared, and no further. n lines sum to less
    than 64 in each byte, and these to less than 256.
    """
    op = tl.load(desc + OP)
    bits = tl.where(op == OP_COPY_FP16, 0x7C007C00, 0x7F800000)
    bits = tl.where(op == OP_COPY_BF16, 0x7F807F80, bits)
    bits = tl.where(op == OP_COPY_CODES, 0x7F7F7F7F, bits).to(tl.uint32)
    lowest = bits ^ (bits & (bits << 1))
    carried = (((words & bits) + lowest) & (bits + lowest)) >> 7
    return tl.sum(((tl.sum(carried, axis=0) * 0x01010101) >> 24).to(tl.int32))


@triton.jit
def _add_count(desc: tl.tensor, nonfinite: tl.tensor, count: tl.tensor) -> None:
    if nonfinite is not None:
        if count != 0:
            tl.atomic_add(nonfinite + tl.load(desc + SLOT), count.to(tl.int64), sem="relaxed")


@triton.jit
def copy_bytes(
    desc: tl.tensor,
    tile_row: tl.tensor,
    tile_col: tl.tensor,
    digests: tl.tensor,
    nonfinite: tl.tensor,
    COUNTED: tl.constexpr,
) -> None:
    """Move and digest 8 rows of 256 bytes with no alignment at all.

    Rows and tiles begin with whole elements: those to count are put together from their bytes.
    """
    source = tl.load(desc + SOURCE).to(tl.pointer_type(tl.uint8))
    row = (tile_row * 8 + tl.arange(0, 8)).to(tl.int64)[:, None]
    col = (tile_col * 256 + tl.arange(0, 256)).to(tl.int64)[None, :]
    inside = (row < tl.load(desc + ROWS)) & (col < tl.load(desc + COLS))
    values = tl.load(source + row * tl.load(desc + SOURCE_STRIDE) + col, mask=inside, other=0)
    address = tl.load(desc + DESTINATION)
    if address != 0:
        destination = address.to(tl.pointer_type(tl.uint8))
        offset = row * tl.load(desc + DESTINATION_STRIDE) + col
        tl.store(destination + offset, values, mask=inside)
    if digests is not None:
        line = tl.load(desc + DIGEST_BASE) + row * tl.load(desc + DIGEST_PITCH)
        terms = element_terms(values.to(tl.uint32), line, col.to(tl.uint32))
        add_digest(digests, tl.load(desc + SLOT), total(terms))
    if COUNTED:
        if nonfinite is not None:
            if tl.load(desc + OP) != OP_COPY:
                placed = values.to(tl.uint32) << ((col & 3) * 8).to(tl.uint32)
                words = tl.sum(tl.reshape(placed, [8, 64, 4]), axis=2)
                _add_count(desc, nonfinite, _not_finite(desc, words))


@triton.jit
def cast_elements(
    desc: tl.tensor,
    tile_row: tl.tensor,
    tile_col: tl.tensor,
    digests: tl.tensor,
    nonfinite: tl.tensor,
) -> None:
    """Convert 4 rows of 256 elements through fp32; count NaN and Inf of, and digest, what is written."""
    slot = tl.load(desc + SLOT)
    row = (tile_row * 4 + tl.arange(0, 4)).to(tl.int64)[:, None]
    col = (tile_col * 256 + tl.arange(0, 256)).to(tl.int64)[None, :]
    inside = (row < tl.load(desc + ROWS)) & (col < tl.load(desc + COLS))
    source = tl.load(desc + SOURCE)
    offset = row * tl.load(desc + SOURCE_STRIDE) + col
    source_dtype = tl.load(desc + SOURCE_DTYPE)
    if source_dtype == DTYPE_BF16:
        pointer = source.to(tl.pointer_type(tl.bfloat16))
        x = tl.load(pointer + offset, mask=inside, other=0).to(tl.float32)
    elif source_dtype == DTYPE_FP16:
        pointer = source.to(tl.pointer_type(tl.float16))
        x = tl.load(pointer + offset, mask=inside, other=0).to(tl.float32)
    else:
        x = tl.load(source.to(tl.pointer_type(tl.float32)) + offset, mask=inside, other=0)

    destination = tl.load(desc + DESTINATION)
    offset = row * tl.load(desc + DESTINATION_STRIDE) + col
    line = tl.load(desc + DIGEST_BASE) + row * tl.load(desc + DIGEST_PITCH)
    destination_dtype = tl.load(desc + DESTINATION_DTYPE)
    if destination_dtype == DTYPE_BF16:
        halves = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        bad = (halves & 0x7F80) == 0x7F80
        tl.store(destination.to(tl.pointer_type(tl.uint16)) + offset, halves, mask=inside)
        terms = element_terms(halves.to(tl.uint32), line, (col * 2).to(tl.uint32))
    elif destination_dtype == DTYPE_FP16:
        halves = x.to(tl.float16).to(tl.uint16, bitcast=True)
        bad = (halves & 0x7C00) == 0x7C00
        tl.store(destination.to(tl.pointer_type(tl.uint16)) + offset, halves, mask=inside)
        terms = element_terms(halves.to(tl.uint32), line, (col * 2).to(tl.uint32))
    else:
        wholes = x.to(tl.uint32, bitcast=True)
        bad = (wholes & 0x7F800000) == 0x7F800000
        tl.store(destination.to(tl.pointer_type(tl.uint32)) + offset, wholes, mask=inside)
        terms = element_terms(wholes, line, (col * 4).to(tl.uint32))
    if nonfinite is not None:
        _add_count(desc, nonfinite, tl.sum(tl.sum(bad.to(tl.int32), axis=1), axis=0))
    if digests is not None:
        add_digest(digests, slot, total(terms))
