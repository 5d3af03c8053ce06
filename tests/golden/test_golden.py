"""The frozen interfaces, to the byte. A difference is a change of the wire format."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from fp8sync.manifest import Manifest
from tests.golden import cases

FOLDER = Path(__file__).parent


def golden(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", cases.FILES)
def test_the_code_writes_the_golden_file(name: str) -> None:
    assert cases.FILES[name]() == golden(name)


def test_golden_manifests_are_read_as_they_were_written() -> None:
    for side, made in (("source", cases.source_manifest()), ("engine", cases.engine_manifest())):
        data = json.loads(golden("manifest.json"))[side]
        read = Manifest.from_json(data["manifest"])
        assert read == made
        assert read.digest() == data["digest"]


def test_the_golden_bytes_hold_what_the_document_says() -> None:
    """A reader of its own: header fields, codes and scales from docs/wire-format.md alone."""
    lines = [line for line in golden("bucket.hex").splitlines() if not line.startswith("#")]
    data = bytes.fromhex(" ".join(lines))
    magic, flags, index, version, size, checksum, _, parts, reserved = struct.unpack_from(
        "<8sIIQQQ16sII", data
    )
    assert (magic, flags, index, version, parts, reserved) == (b"fp8sync\x01", 0, 0, 3, 3, 0)
    payload = data[64 : 64 + size]
    words = struct.unpack(f"<{size // 4}I", payload)
    assert sum(word * key(i) for i, word in enumerate(words)) % 2**64 == checksum
    assert size % 16 == 0
    # tall.weight: 128 x 2 codes, then one scale, a power of two
    assert struct.unpack_from("<f", payload, 256)[0] == 2.0**-6
    source = cases.storages(0)["flat"].tolist()
    for row in range(128):
        for col in range(2):
            value = e4m3(payload[2 * row + col]) * 2.0**-6
            exact = source[6 + 3 * row + col]
            assert abs(value - exact) <= max(abs(exact) / 16, 2.0**-16)
    assert payload[260:272] == bytes(12)


def key(index: int) -> int:
    x = (index + 1) * 0x9E3779B1 % 2**32
    x = (x ^ x >> 15) * 0x85EBCA77 % 2**32
    return x ^ x >> 13


def e4m3(code: int) -> float:
    sign, exponent, fraction = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)
