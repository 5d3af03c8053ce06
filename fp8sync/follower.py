"""A trainer rank other than 0: it sends its share when rank 0 says so, and learns the outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8sync.audit import AuditReport
from fp8sync.errors import Fp8SyncError, PlanMismatch, from_wire
from fp8sync.ledger import trainer_ledger
from fp8sync.manifest import Manifest
from fp8sync.outgoing import Outgoing, Seat, Share, open_sender
from fp8sync.plan import Plan, build_plan
from fp8sync.sender import named_error

if TYPE_CHECKING:
    from fp8sync.control import Channel
    from fp8sync.sender import Sent
    from fp8sync.sources import LiveSource

__all__ = ["Follower"]


class Follower:
    """One trainer rank's side of a link.

    Args:
        channel: connected to trainer rank 0.
        source: this rank's weights.
        rank: this rank among the trainer's.
    """

    def __init__(self, channel: Channel, source: LiveSource, rank: int) -> None:
        self._channel, self._source, self._rank = channel, source, rank
        self._sender: Outgoing | None = None
        self._plan: Plan | None = None
        self._bucket_bytes = 0

    @property
    def plan(self) -> Plan:
        """The agreed plan."""
        if self._plan is None:
            raise Fp8SyncError("no plan yet")
        return self._plan

    def agree(self) -> None:
        """Present this rank's boxes, build the plan, compare digests, join the transport."""
        seat = Seat.of(self._source).to_json()
        self._channel.send({"type": "join", "role": "trainer", "rank": self._rank, "seat": seat})
        self._source.prepare()
        try:
            own = self._source.manifest()
        except Exception as error:
            told = named_error(error, self._rank)
            self._channel.try_send({"type": "error", "error": told.to_wire()})
            raise
        self._channel.send({"type": "manifest", "manifest": own.to_json()})
        message = self._channel.receive("source")
        wanted = Manifest.from_json(message["destination"])
        plan = build_plan(Manifest.from_json(message["manifest"]), wanted)
        mine = {str(rank): plan.digest(rank) for rank in wanted.ranks}
        self._channel.send({"type": "plan", "digests": mine})
        if self._channel.receive("agreed")["digests"] != mine:
            details = {str(rank): plan.digests(rank) for rank in wanted.ranks}
            self._channel.send({"type": "digests", "digests": details})
            raise PlanMismatch(f"trainer rank 0 has another plan than trainer rank {self._rank}")
        self._bucket_bytes = message["bucket_bytes"]
        choice = self._channel.receive("transport")
        size, timeout_s = self._bucket_bytes, self._channel.timeout_s
        self._sender = open_sender(choice, Share(self._source, self._rank, plan, size, timeout_s))
        self._plan = plan
        self._source.release()
        self._channel.send({"type": "ready"})

    def transfer(self) -> Sent:
        """Send this rank's share and wait for the outcome.

        Raises:
            Fp8SyncError: what stopped the refit, on whichever rank.
        """
        if self._sender is None:
            raise Fp8SyncError("the link was not established")
        version = self._opened(audit=False)
        self._source.prepare()
        sent = self._sender.send(version)
        self._source.release()
        self._channel.send(sent.to_json())
        error = self._channel.receive("outcome")["error"]
        if error is not None:
            raise from_wire(error)
        return sent

    def audit(self) -> AuditReport:
        """Show what this rank holds, and return what rank 0 found."""
        self._opened(audit=True)
        self._source.prepare()
        storages = self._source.storages()
        trainer_ledger(storages, self._rank, self.plan, self._bucket_bytes).answer(self._channel)
        self._source.release()
        return AuditReport.from_json(self._channel.receive("audited")["report"])

    def _opened(self, *, audit: bool) -> int:
        message = self._channel.receive("version")
        if bool(message["audit"]) is not audit:
            asked, does = ("audit", "refit") if audit else ("refit", "audit")
            error = Fp8SyncError(
                f"trainer rank {self._rank} was asked to {asked}, but rank 0 to {does}: "
                "every rank makes the same calls"
            )
            self._channel.try_send({"type": "error", "error": error.to_wire()})
            raise error
        return int(message["version"])

    def close(self) -> None:
        """Leave the link."""
        self._channel.close()
        if self._sender is not None:
            self._sender.close()
            self._sender = None
