# ruff: noqa: C901, SIM102 - tests for None are decided at compile time, those they enclose are not
"""One 128x128 block: amax, scale, codes, digest. Reference: reference/table."""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.descriptor import Op
from fp8sync_kernels.gpu.cast import encode_tile
from fp8sync_kernels.gpu.columns import (
    AMAX,
    AMAX_STRIDE,
    DESTINATION,
    DIGEST_BASE,
    DIGEST_PITCH,
    OP,
    SCALE_INV,
    SCALE_STRIDE,
    SLOT,
)
from fp8sync_kernels.gpu.digest import add_digest, scale_digest_word, word_terms
from fp8sync_kernels.gpu.prefetch import prefetch_rows
from fp8sync_kernels.gpu.scale import (
    INF_BITS,
    fp32_multiplier,
    fp32_scale_inv,
    pow2_multiplier,
    pow2_scale_inv,
)
from fp8sync_kernels.gpu.sliced import encode_slices, sliced_amax_bits, sliced_nonfinite
from fp8sync_kernels.gpu.tile import (
    digest_codes,
    load_tile,
    store_codes,
    tile_amax_bits,
)

OP_FP32 = tl.constexpr(int(Op.FP32))
OP_POW2_GIVEN = tl.constexpr(int(Op.POW2_GIVEN))
OP_FP32_GIVEN = tl.constexpr(int(Op.FP32_GIVEN))
OP_AMAX = tl.constexpr(int(Op.AMAX))


@triton.jit
def quantize_block(
    desc: tl.tensor,
    later: tl.tuple,
    block_row: tl.tensor,
    block_col: tl.tensor,
    digests: tl.tensor,
    nonfinite: tl.tensor,
    DTYPE: tl.constexpr,
    LARGEST: tl.constexpr,
    WIDE: tl.constexpr,
    DIVIDES: tl.constexpr,
    CUT: tl.constexpr,
) -> None:
    """Quantize, or take the amax of, block (block_row, block_col) of one row of the table.

    Whatever can wait until the tile has left the registers comes after it: the second division,
    scales, counting. Before, it would take the registers that a further program could live in.
    """
    # Wanted later; their sectors' latency passes while the tile is read.
    op = tl.load(desc + OP).to(tl.int32)
    first_word = (tl.load(desc + DIGEST_BASE) >> 2).to(tl.uint32)
    stored = op != OP_AMAX
    if not DIVIDES:
        stored &= tl.load(desc + DESTINATION) != 0
    if WIDE:
        tile = load_tile(desc, block_row, block_col, DTYPE, CUT, False)
        prefetch_rows(later)
        own_amax_bits = tile_amax_bits(tile, DTYPE)
    else:
        own_amax_bits = sliced_amax_bits(desc, block_row, block_col, DTYPE)

    given = (op == OP_POW2_GIVEN) | (op == OP_FP32_GIVEN)
    by_fp32 = (op == OP_FP32) | (op == OP_FP32_GIVEN)
    amax_pointer = _amax_pointer(desc, block_row, block_col, given)
    amax_bits = tl.where(given, tl.load(amax_pointer, mask=given, other=0), own_amax_bits)
    multiplier = pow2_multiplier(amax_bits)
    if DIVIDES:
        if by_fp32:
            multiplier = fp32_multiplier(amax_bits, LARGEST)

    value = tl.full([], 0, tl.uint64)
    if WIDE:
        codes = encode_tile(tile, multiplier, DTYPE)
        if DIVIDES:  # not before, for lack of a register
            stored &= tl.load(desc + DESTINATION) != 0
        pitch = (tl.load(desc + DIGEST_PITCH) >> 2).to(tl.uint32)
        store_codes(desc, codes, block_row, block_col, stored, CUT)
    # Wanted at the end, and asked for together: one after the other, each would be waited for.
    slot = tl.load(desc + SLOT)
    scale_at = tl.load(desc + SCALE_INV)
    scale_offset = block_row * tl.load(desc + SCALE_STRIDE) + block_col
    scale_word = scale_digest_word(desc, block_row, block_col)
    if WIDE:
        if digests is not None:
            value = digest_codes(desc, first_word, pitch, codes, block_row, block_col, CUT)
    else:
        if op != OP_AMAX:
            value = encode_slices(desc, block_row, block_col, multiplier, DTYPE)

    if op == OP_AMAX:
        tl.store(_amax_pointer(desc, block_row, block_col, True), amax_bits)
    else:
        scale_inv = pow2_scale_inv(amax_bits)
        if DIVIDES:
            if by_fp32:
                scale_inv = fp32_scale_inv(multiplier)
        if scale_at != 0:
            tl.store(scale_at.to(tl.pointer_type(tl.float32)) + scale_offset, scale_inv)
            value += word_terms(scale_inv.to(tl.uint32, bitcast=True), scale_word)
        if digests is not None:
            add_digest(digests, slot, value)
    if nonfinite is not None:
        if own_amax_bits >= INF_BITS:
            count = sliced_nonfinite(desc, block_row, block_col, DTYPE)
            tl.atomic_add(nonfinite + slot, count, sem="relaxed")


@triton.jit
def _amax_pointer(
    desc: tl.tensor, block_row: tl.tensor, block_col: tl.tensor, wanted: tl.tensor
) -> tl.tensor:
    """Where the block's amax is kept, if wanted. Found twice: to keep it would take two registers."""
    stride = tl.load(desc + AMAX_STRIDE, mask=wanted, other=0)
    pointer = tl.load(desc + AMAX, mask=wanted, other=0).to(tl.pointer_type(tl.int32))
    return pointer + block_row * stride + block_col
