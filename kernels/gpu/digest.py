"""The digest inside a kernel. Definition and reference: reference/digest.

Positions are counted in 32-bit words modulo 2^32, as the definition's keys are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8sync_kernels.gpu.columns import SCALE_DIGEST_BASE, SCALE_DIGEST_PITCH

KEY_STEP = tl.constexpr(0x9E3779B1)


@triton.jit
def digest_key(word: tl.tensor) -> tl.tensor:
    """uint32 word index -> uint32 key."""
    return key_of_step((word + 1) * KEY_STEP)


@triton.jit
def key_of_step(x: tl.tensor) -> tl.tensor:
    """(word index + 1) * KEY_STEP -> key. A product of sums is cheaper as a sum of products."""
    x = (x ^ (x >> 15)) * 0x85EBCA77
    return x ^ (x >> 13)


@triton.jit
def word_terms(words: tl.tensor, index: tl.tensor) -> tl.tensor:
    """uint32 words at uint32 word indices -> uint64 terms of the sum."""
    return words.to(tl.uint64) * digest_key(index).to(tl.uint64)


@triton.jit
def element_terms(bits: tl.tensor, line: tl.tensor, offset: tl.tensor) -> tl.tensor:
    """Elements of 1, 2 or 4 bytes (uint32 bits) -> uint64 terms.

    Their byte positions are line + offset: int64 for a line of elements, uint32 within it. Split so
    because 64-bit arithmetic for every element costs more registers than a program has.
    """
    within = (line & 3).to(tl.uint32) + offset
    index = (line >> 2).to(tl.uint32) + (within >> 2)
    return word_terms(bits << ((within & 3) * 8), index)


@triton.jit
def total(terms: tl.tensor) -> tl.tensor:
    """Sum of a tile of uint64 terms."""
    return tl.sum(terms)


@triton.jit
def add_digest(digests: tl.tensor, slot: tl.tensor, value: tl.tensor) -> None:
    """Add a uint64 to int64 ``digests[slot]``, modulo 2^64, in any order."""
    tl.atomic_add(digests + slot, value.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def scale_digest_word(desc: tl.tensor, block_row: tl.tensor, block_col: tl.tensor) -> tl.tensor:
    """uint32 index of the word that one block's scale_inv is in its digested part."""
    pitch = tl.load(desc + SCALE_DIGEST_PITCH)
    position = tl.load(desc + SCALE_DIGEST_BASE) + block_row * pitch + block_col * 4
    return (position >> 2).to(tl.uint32)
