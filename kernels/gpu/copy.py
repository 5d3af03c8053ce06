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
from fp8sync_kernels.gpu.scale import INF_BITS, MAGNITUDE_MASK

DTYPE_BF16 = tl.constexpr(int(Dtype.BF16))
DTYPE_FP16 = tl.constexpr(int(Dtype.FP16))
OP_COPY_CODES = tl.constexpr(int(Op.COPY_CODES))


@triton.jit
def copy_words(
    desc: tl.tensor,
    tile_row: tl.tensor,
    tile_col: tl.tensor,
    digests: tl.tensor,
    nonfinite: tl.tensor,
    WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CODES: tl.constexpr,
) -> None:
    """Move and digest 1024 bytes of each of 32 rows, all addresses and widths multiples of 16.

    Without WIDE: of 8 rows, multiples of 4. AT_ONCE: rows that are held in registers together.
    CODES: some rows of the table hold FP8 codes, whose NaN are counted.
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
        if CODES:
            if nonfinite is not None:
                if tl.load(desc + OP) == OP_COPY_CODES:
                    count += _nan_codes(words)
        if digests is not None:
            pitch = (tl.load(desc + DIGEST_PITCH) >> 2).to(tl.uint32)
            word_row = (tl.load(desc + DIGEST_BASE) >> 2).to(tl.uint32) + row.to(tl.uint32) * pitch
            value += total(word_terms(words, word_row[:, None] + col.to(tl.uint32)[None, :]))
    if digests is not None:
        add_digest(digests, tl.load(desc + SLOT), value)
    if CODES:
        _add_count(desc, nonfinite, count)


@triton.jit
def _nan_codes(words: tl.tensor) -> tl.tensor:
    """Number of codes 0x7F and 0xFF in uint32 [n, 256], n below 64: a byte holds what four lines sum to."""
    nan = (((words & 0x7F7F7F7F) + 0x01010101) >> 7) & 0x01010101
    return tl.sum(((tl.sum(nan, axis=0) * 0x01010101) >> 24).to(tl.int32))


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
    CODES: tl.constexpr,
) -> None:
    """Move and digest 8 rows of 256 bytes with no alignment at all."""
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
    if CODES:
        if tl.load(desc + OP) == OP_COPY_CODES:
            nan = ((values & 0x7F) == 0x7F).to(tl.int32)
            _add_count(desc, nonfinite, tl.sum(tl.sum(nan, axis=1), axis=0))


@triton.jit
def cast_elements(
    desc: tl.tensor,
    tile_row: tl.tensor,
    tile_col: tl.tensor,
    digests: tl.tensor,
    nonfinite: tl.tensor,
) -> None:
    """Convert 4 rows of 256 elements through fp32, count NaN and Inf, digest what is written."""
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
    if nonfinite is not None:
        bad = ((x.to(tl.int32, bitcast=True) & MAGNITUDE_MASK) >= INF_BITS).to(tl.int32)
        _add_count(desc, nonfinite, tl.sum(tl.sum(bad, axis=1), axis=0))

    destination = tl.load(desc + DESTINATION)
    offset = row * tl.load(desc + DESTINATION_STRIDE) + col
    line = tl.load(desc + DIGEST_BASE) + row * tl.load(desc + DIGEST_PITCH)
    destination_dtype = tl.load(desc + DESTINATION_DTYPE)
    if destination_dtype == DTYPE_BF16:
        halves = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        tl.store(destination.to(tl.pointer_type(tl.uint16)) + offset, halves, mask=inside)
        terms = element_terms(halves.to(tl.uint32), line, (col * 2).to(tl.uint32))
    elif destination_dtype == DTYPE_FP16:
        halves = x.to(tl.float16).to(tl.uint16, bitcast=True)
        tl.store(destination.to(tl.pointer_type(tl.uint16)) + offset, halves, mask=inside)
        terms = element_terms(halves.to(tl.uint32), line, (col * 2).to(tl.uint32))
    else:
        wholes = x.to(tl.uint32, bitcast=True)
        tl.store(destination.to(tl.pointer_type(tl.uint32)) + offset, wholes, mask=inside)
        terms = element_terms(wholes, line, (col * 4).to(tl.uint32))
    if digests is not None:
        add_digest(digests, slot, total(terms))
