"""The 64-bit position-dependent digest, defined to the byte, in PyTorch.

Definition. The bytes of a part are grouped into 32-bit little-endian words, byte ``p`` being byte
``p mod 4`` of word ``p div 4``; bytes that do not exist count as zero. With all arithmetic of
``key`` modulo 2^32::

    key(i):  x = (i + 1) * 0x9E3779B1;  x ^= x >> 15;  x *= 0x85EBCA77;  x ^= x >> 13
    digest = sum over i of word(i) * key(i)   modulo 2^64

Consequences, all of them used:

* the sum may be taken in any order, and over any division of the part into pieces, each piece
  taken at its own position (`base`): the pieces' digests add up, modulo 2^64;
* zero bytes add nothing, so alignment padding with zeros does not change a digest;
* ``key`` is one-to-one and not 0 for i < 2^32 - 1, so in a part below 16 GiB any change of one
  word and any exchange of two different words is seen with certainty;
* other changes are missed by chance: one in 2^64 where many words change in many bits (exchanged
  blocks, say). It is greatest where a few words all change by one amount: one in 2^32 or so for
  words anywhere, one in 2^24.7 to 2^28.2 for two pairs of words that lie equally far apart
  (counted among 2^22 pairs each, at 15 distances of 1 to 65536 words).

It guards against mistakes, not against an adversary.
"""

from __future__ import annotations

from functools import lru_cache

import torch

KEY_STEP = 0x9E3779B1
KEY_FACTOR = 0x85EBCA77
_CHUNK_WORDS = 1 << 16


def digest(data: torch.Tensor, base: int = 0) -> int:
    """Digest `data` as the bytes [base, base + len) of a part.

    Args:
        data: uint8 ``[n]``, any device, any n.
        base: position of the first byte within its part, in bytes.

    Returns:
        The digest as an unsigned 64-bit value, 0 <= digest < 2^64.

    Raises:
        TypeError: `data` is not a 1-D uint8 tensor.

    Examples:
        >>> part = torch.arange(100, dtype=torch.uint8)
        >>> (digest(part[:37]) + digest(part[37:], base=37)) % 2**64 == digest(part)
        True
    """
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise TypeError(f"digest takes 1-D uint8, got {data.dim()}-D {data.dtype}")
    lead = base % 4
    body = data.contiguous()
    if lead or body.numel() % 4 or body.storage_offset() % 4:
        padded = body.new_zeros(-(-(lead + body.numel()) // 4) * 4)
        padded[lead : lead + body.numel()] = body
        body = padded
    words = body.view(torch.int32)
    first_word = base // 4
    total = 0
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        total += _chunk_sum(chunk, first_word + start)
    return total % (1 << 64)


def digest_rows(matrix: torch.Tensor, base: int, pitch: int) -> int:
    """Digest a 2-D tensor of any dtype whose rows lie `pitch` bytes apart, from byte `base` on.

    The rows must not overlap (pitch >= bytes in a row), or there is one row only.
    """
    rows = matrix.contiguous().view(torch.uint8)
    count, width = rows.shape
    if count == 1 or width == pitch:
        return digest(rows.view(-1), base)
    lines_at_once = max(1, _CHUNK_WORDS * 4 // pitch)
    total = 0
    for first in range(0, count, lines_at_once):
        lines = rows[first : first + lines_at_once]
        spaced = lines.new_zeros(lines.shape[0], pitch)
        spaced[:, :width] = lines
        total += digest(spaced.view(-1), base + first * pitch)
    return total % (1 << 64)


def key(word_index: int) -> int:
    """The multiplier of one word, as the module docstring defines it (for tests and documents)."""
    x = (word_index + 1) * KEY_STEP & 0xFFFFFFFF
    x = (x ^ x >> 15) * KEY_FACTOR & 0xFFFFFFFF
    return x ^ x >> 13


def _chunk_sum(words: torch.Tensor, first_word: int) -> int:
    keys = _keys(first_word, words.numel(), words.device)
    keys *= words.view(torch.uint32).to(torch.int64)
    return int(keys.sum())


def _keys(first_word: int, count: int, device: torch.device) -> torch.Tensor:
    """int64 ``[count]`` of keys. int32 arithmetic wraps; the masks make its shifts logical."""
    x = _steps(device)[:count] + _wrap((first_word + 1) * KEY_STEP)
    shifted = x >> 15
    x ^= shifted.bitwise_and_(0x1FFFF)
    x *= _wrap(KEY_FACTOR)
    torch.bitwise_right_shift(x, 13, out=shifted)
    x ^= shifted.bitwise_and_(0x7FFFF)
    return x.view(torch.uint32).to(torch.int64)


@lru_cache(maxsize=8)
def _steps(device: torch.device) -> torch.Tensor:
    return torch.arange(_CHUNK_WORDS, dtype=torch.int32, device=device) * _wrap(KEY_STEP)


def _wrap(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
