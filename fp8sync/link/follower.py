"""A trainer rank other than 0: it sends its share when rank 0 says so, and learns the outcome."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from fp8sync.audit.report import AuditReport
from fp8sync.collector import uncollected
from fp8sync.control import Channel
from fp8sync.engines.vllm import check_in_flight
from fp8sync.errors import EngineLost, EngineUnusable, Fp8SyncError, from_wire
from fp8sync.link.commit import half_installed
from fp8sync.link.member import Member
from fp8sync.manifest import Manifest
from fp8sync.plan import LinkPlan
from fp8sync.plan.forward import with_marks
from fp8sync.recipe import Recipe
from fp8sync.report import LazyTensorReports, RefitReport
from fp8sync.sending.share import Sent, Written, named_error
from fp8sync.sources import LiveSource, as_source
from fp8sync.trainers import hear, rank_and_size
from fp8sync.waiting import HostTime

if TYPE_CHECKING:
    from fp8sync.engines.vllm import InFlight
    from fp8sync.plan import Plan

__all__ = ["Follower", "FollowerLink"]

_ANNOUNCED = 8
"""Timeouts until a version is announced. Rank 0 may spend seven: three on each of what it asks vLLM before, whether it
is paused and for its label, and one on other ranks that read nothing."""
_PATIENCE = 30
"""Timeouts until the outcome. Rank 0 may spend 29: one on votes, two on forwarding, one on preparing, one on the
commit, and three on each of vLLM's calls: its update, whether it is paused, the pause and requests in flight before
and after, two caches, the label; or, of an engine that nobody has paused, going on."""


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
        """Of the agreed plan, what this rank sends."""
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
        whole = Sent(self._member.rank)
        portion, version = 0, 0
        try:
            for portion in range(self._member.portions):
                version = self._send_portion(portion, whole)
        except Fp8SyncError as error:
            if portion and not isinstance(error, EngineUnusable):
                raise half_installed(error, portion, self._member.portions) from error
            raise
        return version, whole

    def _send_portion(self, portion: int, whole: Sent) -> int:
        version = self._opened(audit=False)
        sent = self._member.send(version, portion, self._tell)
        whole.add(sent)
        self._channel.send(sent.to_json())
        error = self._channel.receive("outcome", _PATIENCE * self._channel.timeout_s)["error"]
        if error is not None:
            raise from_wire(error)
        return version

    def _tell(self, written: Written | None) -> None:
        ranks = None if written is None else list(written)
        self._channel.try_send({"type": "written", "ranks": ranks}, [*(written or {}).values()])

    def audit(self) -> AuditReport:
        """Show what this rank holds, and return what rank 0 found."""
        self._opened(audit=True)
        try:
            ledger = self._member.ledger()
        except Fp8SyncError as error:
            self._channel.try_send({"type": "error", "error": error.to_wire()})
            raise
        ledger.answer(self._channel)
        return AuditReport.from_json(self._channel.receive("audited")["report"])

    def _opened(self, *, audit: bool) -> int:
        message = self._channel.receive("version", _ANNOUNCED * self._channel.timeout_s)
        self._member.announced = time.perf_counter()
        if bool(message["audit"]) is not audit:
            asked, does = ("audit", "refit") if audit else ("refit", "audit")
            error = Fp8SyncError(
                f"trainer rank {self._member.rank} was asked to {asked}, but rank 0 to {does}: "
                "every rank makes the same calls"
            )
            self._channel.try_send({"type": "error", "error": error.to_wire()})
            raise error
        return int(message["version"])

    @property
    def hung_up(self) -> bool:
        """Whether rank 0 has left the link."""
        return self._channel.hung_up()

    def close(self) -> None:
        """Leave the link."""
        self._channel.close()
        self._member.close()

    def _planned(self, wanted: Manifest) -> Plan:
        """Plan what this rank sends; what of it is forwarded follows from all copies, and rank 0 says it."""
        try:
            plan = self._member.make_plan(wanted)
        except Fp8SyncError:
            # It is rank 0's error instead, which lists the faults of all copies.
            self._channel.receive("forwarded")
            raise
        if marks := self._channel.receive("forwarded")["marks"]:
            plan = self._member.adopt(with_marks(plan, marks))
        return plan

    def _agree(self) -> None:
        channel, member = self._channel, self._member
        channel.send({"type": "join", "role": "trainer", "rank": member.rank})
        member.source.prepare()
        own, seat = member.source.manifest().to_json(), member.seat.to_json()
        channel.send({"type": "manifest", "manifest": own, "seat": seat})
        message = channel.receive("source")
        member.learn(Manifest.from_json(message["manifest"]), Recipe.from_json(message["recipe"]))
        wanted = Manifest.from_json(channel.receive("destination")["manifest"])
        plan = self._planned(wanted)
        mine = {str(rank): digest for rank, digest in plan.share_digests(member.rank).items()}
        mine["amax"] = plan.amax_digest()
        channel.send({"type": "plan", "digests": mine})
        if channel.receive("agreed")["digests"] != mine:
            details = {str(rank): plan.digests(rank) for rank in wanted.ranks}
            details["amax"] = plan.amax_digests()
            channel.send({"type": "digests", "digests": details})
            channel.receive("error")  # rank 0's, which names the tensor
        choice = channel.receive("transport")
        size, team, host = (message[key] for key in ("bucket_bytes", "team", "host"))
        member.open(choice, size, channel.timeout_s, team, host)
        channel.send({"type": "ready"})


class FollowerLink:
    """The link as trainer ranks other than 0 hold it; made by `connect`.

    Ranks that pass no engine cannot tell the engines apart; rank 0 names the link that it means.

    Raises:
        Fp8SyncError: whatever stopped rank 0, or another rank, from connecting.
        TransferTimeout: rank 0 made no such call within the timeout.

    Examples:
        >>> link = fp8sync.connect(model, None)  # on rank 3, say  # doctest: +SKIP
        >>> link.refit()  # doctest: +SKIP
    """

    def __init__(self, model: Any, recipe: Recipe, timeout_s: float) -> None:
        self._model = model
        self.recipe = recipe
        self.version = 0
        self._timeout_s = timeout_s
        self._followers: dict[str, Follower] = {}
        self._current = ""
        self._join(self._invited())

    @property
    def plan(self) -> LinkPlan:
        """What this rank sends of the plan that all agreed on; rank 0's link has all of it."""
        return LinkPlan(self._connected().plan)

    def refit(self, in_flight: InFlight = "wait") -> RefitReport:
        """Send this rank's share of a version. Returns, or raises, what rank 0 learned.

        Rank 0 decides about requests in flight; `in_flight` is checked and otherwise ignored here.
        The report's bytes, seconds and tensors are this rank's share alone.

        Raises:
            ValueError: unknown `in_flight`.
            TransferTimeout: rank 0 made no such call within the timeout.
            Fp8SyncError: what stopped the refit, on whichever rank; see `Link.refit`.
        """
        check_in_flight(in_flight)
        said = self._heard()
        if "open" in said:
            self._join(said)
        began, host = time.perf_counter(), HostTime()
        self._current = said["link"]
        follower = self._connected()
        try:
            version, sent = follower.transfer()
        except Fp8SyncError as error:
            if error.severed:  # rank 0 leaves, too
                self._leave(self._current)
            raise
        self.version = version
        seconds = {
            "quantize": sent.quantize_s,
            "send": sent.send_s,
            "total": time.perf_counter() - began,
        }
        tensors = LazyTensorReports(follower.plan, sent.parts, {sent.rank})
        return RefitReport(self.version, sent.bytes, seconds, 0.0, tensors, host_s=host.seconds)

    def audit(self) -> AuditReport:
        """Show this rank's weights to the audit that rank 0 leads, and return what it found.

        Raises:
            Fp8SyncError: what stopped the audit on this rank.
            TransferTimeout, EngineLost: a peer did not answer, or is gone, be it for an error of its own.
        """
        return self._connected().audit()

    def __enter__(self) -> FollowerLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the link."""
        for name in list(self._followers):
            self._leave(name)

    def let_go(self) -> None:
        """Free what was made for engines whose links rank 0 has left."""
        for name in [n for n, follower in self._followers.items() if follower.hung_up]:
            self._leave(name)

    def _leave(self, name: str) -> None:
        follower = self._followers.pop(name, None)
        if follower is not None:
            follower.close()

    def _connected(self) -> Follower:
        if self._current not in self._followers:
            raise EngineLost("the link is down; the next refit() connects again")
        return self._followers[self._current]

    def _heard(self) -> dict[str, Any]:
        said = hear(self._timeout_s)
        if "error" in said:
            raise from_wire(said["error"])
        return said

    def _invited(self) -> dict[str, Any]:
        """Wait for a link to be opened; a refit of another one, which this rank missed, is passed over."""
        while "open" not in (said := self._heard()):
            pass
        return said

    def _join(self, said: dict[str, Any]) -> None:
        name, info = said["link"], said["open"]
        self._leave(name)
        channel = Channel.connect(info["host"], info["port"], info["token"], info["timeout_s"])
        source = LiveSource(partial(as_source, self._model))
        follower = Follower(
            channel, Member(source, rank_and_size()[0], channel.progress, channel.hung_up)
        )
        try:
            with uncollected():
                follower.agree()
        except BaseException:
            follower.close()
            raise
        self._followers[name], self._current = follower, name
