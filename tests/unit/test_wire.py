"""Headers that are truncated, foreign, stale, reordered or flipped are recognized, field by field."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8sync.errors import CorruptBucket
from fp8sync.wire.header import ABORT, HEADER_BYTES, Header
from fp8sync_kernels import digest

PAYLOAD = torch.arange(96, dtype=torch.uint8)
HEADER = Header(
    index=3,
    version=41,
    payload_bytes=96,
    digest=digest(PAYLOAD),
    plan=bytes(range(16)),
    parts=2,
)
headers = st.builds(
    Header,
    index=st.integers(0, 2**32 - 1),
    version=st.integers(0, 2**64 - 1),
    payload_bytes=st.integers(0, 2**64 - 1),
    digest=st.integers(0, 2**64 - 1),
    plan=st.binary(min_size=16, max_size=16),
    parts=st.integers(0, 2**32 - 1),
    flags=st.integers(0, 2**32 - 1),
)


@given(headers)
def test_a_header_survives_its_bytes(header: Header) -> None:
    data = header.pack()
    assert len(data) == HEADER_BYTES == 64
    assert Header.unpack(data) == header
    assert Header.unpack(data + b"payload") == header
    header.check(header, "here")


def test_every_field_has_its_place() -> None:
    data = replace(HEADER, flags=ABORT).pack()
    assert data[:8] == b"fp8sync\x01"
    assert struct.unpack_from("<II", data, 8) == (1, 3)
    assert struct.unpack_from("<QQQ", data, 16) == (41, 96, HEADER.digest)
    assert data[40:56] == bytes(range(16))
    assert struct.unpack_from("<II", data, 56) == (2, 0)


@pytest.mark.parametrize("length", [0, 1, 63])
def test_truncated(length: int) -> None:
    with pytest.raises(CorruptBucket, match=f"expected 64 bytes, found {length}"):
        Header.unpack(HEADER.pack()[:length])


@pytest.mark.parametrize("position", range(8))
def test_wrong_magic_or_another_version_of_the_format(position: int) -> None:
    data = bytearray(HEADER.pack())
    data[position] ^= 2
    with pytest.raises(CorruptBucket, match="expected magic"):
        Header.unpack(bytes(data))


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("index", 4),  # the next bucket came first
        ("index", 2),  # the last one came again
        ("version", 40),  # of the refit before
        ("payload_bytes", 95),
        ("digest", HEADER.digest ^ 1),
        ("plan", bytes(16)),
        ("parts", 1),
    ],
)
def test_one_wrong_field_is_named(field: str, found: object) -> None:
    arrived = Header.unpack(replace(HEADER, **{field: found}).pack())
    with pytest.raises(CorruptBucket) as refusal:
        arrived.check(HEADER, "engine rank 5, bucket 3")
    expected = getattr(HEADER, field)
    line = f"engine rank 5, bucket 3: {field} expected {expected!r}, found {found!r}"
    assert refusal.value.violations == (line,)


def test_all_wrong_fields_are_listed_at_once() -> None:
    arrived = replace(HEADER, index=9, version=9, parts=9)
    with pytest.raises(CorruptBucket) as refusal:
        arrived.check(HEADER, "here")
    names = [line.split()[1] for line in refusal.value.violations]
    assert names == ["index", "version", "parts"]


def test_any_flipped_bit_of_the_header_is_seen() -> None:
    """But for the flags, which say what to do, and the reserved word, which says nothing yet."""
    flags, reserved = range(8, 12), range(60, 64)
    for bit in range(8 * HEADER_BYTES):
        data = bytearray(HEADER.pack())
        data[bit // 8] ^= 1 << bit % 8
        if bit // 8 in reserved:
            assert Header.unpack(bytes(data)) == HEADER
        elif bit // 8 in flags:
            assert Header.unpack(bytes(data)).flags == 1 << (bit - 64)
        else:
            assert _is_refused(bytes(data))


def _is_refused(data: bytes) -> bool:
    try:
        Header.unpack(data).check(HEADER, "here")
    except CorruptBucket:
        return True
    return False


def test_any_flipped_bit_of_the_payload_is_seen() -> None:
    for byte in range(len(PAYLOAD)):
        for bit in range(8):
            flipped = PAYLOAD.clone()
            flipped[byte] ^= 1 << bit
            arrived = replace(HEADER, digest=digest(flipped))
            with pytest.raises(CorruptBucket, match="digest expected"):
                HEADER.check(arrived, "here")


@given(st.permutations(range(6)))
def test_exchanged_pieces_of_the_payload_are_seen(order: list[int]) -> None:
    pieces = PAYLOAD.view(6, 16)
    same = order == sorted(order)
    assert (digest(pieces[order].reshape(-1)) == HEADER.digest) is same
