"""A trainer rank other than 0: it sends its share when rank 0 says so, and learns the outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8sync.audit import AuditReport
from fp8sync.errors import Fp8SyncError, PlanMismatch, from_wire
from fp8sync.manifest import Manifest
from fp8sync.sender import named_error

if TYPE_CHECKING:
    from fp8sync.control import Channel
    from fp8sync.member import Member
    from fp8sync.plan import Plan
    from fp8sync.sender import Sent

__all__ = ["Follower"]


class Follower:
    """One trainer rank's side of a link.

    Args:
        channel: connected to trainer rank 0.
        member: this rank.
    """

    def __init__(self, channel: Channel, member: Member) -> None:
        self._channel, self._member = channel, member

    @property
    def plan(self) -> Plan:
        """The agreed plan."""
        return self._member.plan

    def agree(self) -> None:
        """Present this rank's boxes, build the plan, compare digests, join the transport."""
        try:
            self._agree()
        except Exception as error:
            told = named_error(error, self._member.rank)
            self._channel.try_send({"type": "error", "error": told.to_wire()})
            raise

    def transfer(self) -> tuple[int, Sent]:
        """Send this rank's share and wait for the outcome; returns the version with it.

        Raises:
            Fp8SyncError: what stopped the refit, on whichever rank.
        """
        version = self._opened(audit=False)
        sent = self._member.send(version)
        self._channel.send(sent.to_json())
        error = self._channel.receive("outcome")["error"]
        if error is not None:
            raise from_wire(error)
        return version, sent

    def audit(self) -> AuditReport:
        """Show what this rank holds, and return what rank 0 found."""
        self._opened(audit=True)
        self._member.ledger().answer(self._channel)
        return AuditReport.from_json(self._channel.receive("audited")["report"])

    def _opened(self, *, audit: bool) -> int:
        message = self._channel.receive("version")
        if bool(message["audit"]) is not audit:
            asked, does = ("audit", "refit") if audit else ("refit", "audit")
            error = Fp8SyncError(
                f"trainer rank {self._member.rank} was asked to {asked}, but rank 0 to {does}: "
                "every rank makes the same calls"
            )
            self._channel.try_send({"type": "error", "error": error.to_wire()})
            raise error
        return int(message["version"])

    def close(self) -> None:
        """Leave the link."""
        self._channel.close()
        self._member.close()

    def _agree(self) -> None:
        channel, member = self._channel, self._member
        channel.send({"type": "join", "role": "trainer", "rank": member.rank})
        member.source.prepare()
        own, seat = member.source.manifest().to_json(), member.seat.to_json()
        channel.send({"type": "manifest", "manifest": own, "seat": seat})
        message = channel.receive("source")
        wanted = Manifest.from_json(message["destination"])
        plan = member.make_plan(Manifest.from_json(message["manifest"]), wanted)
        mine = {str(rank): plan.digest(rank) for rank in wanted.ranks}
        channel.send({"type": "plan", "digests": mine})
        if channel.receive("agreed")["digests"] != mine:
            details = {str(rank): plan.digests(rank) for rank in wanted.ranks}
            channel.send({"type": "digests", "digests": details})
            raise PlanMismatch(f"trainer rank 0 has another plan than trainer rank {member.rank}")
        choice = channel.receive("transport")
        size, team, host = (message[key] for key in ("bucket_bytes", "team", "host"))
        member.open(choice, size, channel.timeout_s, team, host)
        channel.send({"type": "ready"})
