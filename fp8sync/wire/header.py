"""The 64 bytes in front of every bucket (docs/wire-format.md).

They make each message self-describing, so that a truncated, reordered, stale or foreign bucket is
recognized before its payload is looked at.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fp8sync.errors import CorruptBucket

__all__ = ["ABORT", "HEADER_BYTES", "Header"]

_LAYOUT = struct.Struct("<8sIIQQQ16sII")
_MAGIC = b"fp8sync\x01"
HEADER_BYTES = _LAYOUT.size
ABORT = 1
"""Flag: the sender failed; the payload is void and nothing follows."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a bucket says of itself; all integers little-endian and unsigned.

    `digest` is `fp8sync_kernels.digest` of the payload, `plan` the first 16 bytes of the plan's digest.
    """

    index: int
    version: int
    payload_bytes: int
    digest: int
    plan: bytes
    parts: int
    flags: int = 0

    def pack(self) -> bytes:
        """Return the header's 64 bytes."""
        fields = (self.flags, self.index, self.version, self.payload_bytes, self.digest)
        return _LAYOUT.pack(_MAGIC, *fields, self.plan[:16], self.parts, 0)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Parse 64 bytes.

        Raises:
            CorruptBucket: too short, or not a bucket of this wire format.
        """
        if len(data) < HEADER_BYTES:
            raise CorruptBucket(f"bucket header: expected {HEADER_BYTES} bytes, found {len(data)}")
        magic, flags, index, version, size, digest, plan, parts, _ = _LAYOUT.unpack_from(data)
        if magic != _MAGIC:
            raise CorruptBucket(f"bucket header: expected magic {_MAGIC!r}, found {magic!r}")
        return cls(index, version, size, digest, plan, parts, flags)

    def check(self, expected: Header, where: str) -> None:
        """Compare with the header that has to arrive next.

        Raises:
            CorruptBucket: listing every field that differs.
        """
        faults = [
            f"{where}: {name} expected {want!r}, found {found!r}"
            for name in ("index", "version", "payload_bytes", "digest", "plan", "parts")
            if (want := getattr(expected, name)) != (found := getattr(self, name))
        ]
        if faults:
            raise CorruptBucket("a bucket is not the one that the plan expects", faults)
