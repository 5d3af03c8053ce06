"""The digest inside a kernel. Definition and reference: reference/digest.

Positions are counted in 32-bit words modulo 2^32, as the definition's keys are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def digest_key(word: tl.tensor) -> tl.tensor:
    """uint32 word index -> uint32 key."""
    x = (word + 1) * 0x9E3779B1
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
