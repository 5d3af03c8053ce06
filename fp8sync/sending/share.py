"""What a trainer rank has to send, what it says when it has, and what every way out can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from fp8sync.errors import Fp8SyncError, from_wire
from fp8sync.plan import Bucket, fill_buckets
from fp8sync.wire.payload import PartReport

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from fp8sync.manifest import Manifest
    from fp8sync.plan import Plan, Stamps
    from fp8sync.sending.exchange import AmaxExchange
    from fp8sync.sources import Source
    from fp8sync.wire.payload import Storages

__all__ = ["Outgoing", "Sent", "Share", "Told", "Written", "named_error", "own_buckets"]

Written = dict[int, bytes]
"""By engine rank, the digests of the copies of one part: int64 little-endian."""

Told = Callable[[Written | None], None]
"""Takes word of each part that lies in staging memory, in order; None for one that never will."""


@dataclass
class Sent:
    """What one rank sent: filled while it sends, complete or with the error that stopped it."""

    rank: int
    parts: list[PartReport] = field(default_factory=list)
    bytes: int = 0
    quantize_s: float = 0.0
    send_s: float = 0.0
    error: Fp8SyncError | None = None

    def add(self, later: Sent) -> None:
        """Add what the same rank sent in a later portion of the version."""
        self.parts += later.parts
        self.bytes += later.bytes
        self.quantize_s += later.quantize_s
        self.send_s += later.send_s

    def to_json(self) -> dict[str, Any]:
        """Return the share as a control message."""
        parts = [[p.tensor, p.nonfinite, p.error_sq, p.norm_sq] for p in self.parts]
        error = self.error and self.error.to_wire()
        times = {"quantize_s": self.quantize_s, "send_s": self.send_s}
        own = {"rank": self.rank, "parts": parts, "bytes": self.bytes, "error": error}
        return {"type": "sent", **own, **times}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sent:
        """Rebuild a share from `to_json`."""
        parts = [PartReport(*row) for row in data["parts"]]
        error = from_wire(data["error"]) if data["error"] else None
        times = data["quantize_s"], data["send_s"]
        return cls(data["rank"], parts, data["bytes"], *times, error)


class Outgoing(Protocol):
    """One trainer rank's way out."""

    def send(self, version: int, told: Told) -> Sent:
        """Send this rank's share; never raises. A way that is one-sided tells of each part."""

    def close(self) -> None:
        """Free what the way holds; a `send` under way ends with an error."""


@dataclass(frozen=True)
class Share:
    """What one trainer rank has to send.

    Args:
        source: where its weights are.
        rank: this rank among the trainer's.
        held: the boxes of all trainer ranks.
        plan: the agreed plan, or of it what this rank sends.
        timeout_s: limit of every wait for a peer.
        exchange: agrees on the amax of blocks of which this rank has a part.
        progress: takes word of how many messages are left, after each that is away.
        given_up: whether workers may wait no longer for what this rank writes into their memory.
        portion: number of the portion of a version that `plan` is.
        stamps: what headers say of the plan of all ranks; not given where `plan` is that one.
    """

    source: Source
    rank: int
    held: Manifest
    plan: Plan
    timeout_s: float
    exchange: AmaxExchange
    progress: Callable[[int], None] = lambda _: None
    given_up: Callable[[], bool] = lambda: False
    portion: int = 0
    stamps: Sequence[Stamps] | None = None

    def plan_id(self, rank: int) -> bytes:
        """Return what headers to an engine rank say of the plan."""
        if self.stamps is None:
            return bytes.fromhex(self.plan.digest(rank))[:16]
        return next(bytes.fromhex(known) for to, known, _ in self.stamps if to == rank)

    def read(self, names: Collection[str] = ()) -> Storages:
        """Return the weights as they are now, and bring `exchange.amax` up to date with them.

        A collective of the ranks that share blocks: once per refit, in its first portion, whatever
        else fails.

        Args:
            names: of the storages that are looked at here; a `LiveTable` looks at its own.

        Raises:
            TensorMismatch: some lie otherwise than when they were first looked at.
        """
        read = partial(self.exchange.alike.read, self.source.storages, names)
        return read() if self.portion else self.exchange.agree(read)


def own_buckets(share: Share, ranks: Iterable[int], bucket_bytes: int) -> list[Bucket]:
    """Return the buckets of a trainer rank's share, by engine rank."""
    first = {rank: index for rank, _, index in share.stamps or ()}
    return [
        replace(bucket, index=first.get(rank, 0) + bucket.index)
        for rank in ranks
        for bucket in fill_buckets(share.plan.fed(rank), bucket_bytes)
        if bucket.source_rank == share.rank
    ]


def named_error(error: BaseException, rank: int) -> Fp8SyncError:
    """Return `error` as one of ours, naming the rank."""
    if isinstance(error, Fp8SyncError):
        return error
    return Fp8SyncError(f"trainer rank {rank} failed: {type(error).__name__}: {error}")
