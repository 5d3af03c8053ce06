"""Trainer rank 0's conversation with everyone else: agree on a plan, send, lead the commit.

Engine workers and the trainer's other ranks (`follower`) join over the same control channel. Runs in one
thread. Every wait is bounded by the link's timeout; every error names the peer.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8sync.audit.auditor import Auditor
from fp8sync.audit.units import is_kv_scale
from fp8sync.errors import EngineLost, Fp8SyncError, PeerFailed, UnsupportedLayout, gathered
from fp8sync.link.commit import choose_commit, strategies_of
from fp8sync.link.faults import as_ours, broken, difference, failures, nonfinite, with_refusals
from fp8sync.link.peers import Peers
from fp8sync.manifest import Manifest
from fp8sync.plan import in_order, in_portions, messages_of, stamps_of
from fp8sync.plan.coverage import check_all_used
from fp8sync.plan.forward import as_runs, marks_of
from fp8sync.plan.merge import merge_ranks, taken_whole
from fp8sync.report import LazyTensorReports
from fp8sync.sending.nodes import Feeding, choose_feeding
from fp8sync.sending.outgoing import choose_transport, forward_bytes, not_linked
from fp8sync.sending.share import Sent, Written, named_error
from fp8sync.transport import Invitation
from fp8sync.transport.seat import Seat
from fp8sync.waiting import Laps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8sync.audit.ledger import Ledger
    from fp8sync.audit.report import AuditReport
    from fp8sync.control import Listener, Message
    from fp8sync.link.member import Member
    from fp8sync.plan import Copy, Plan
    from fp8sync.recipe import Recipe

__all__ = ["Conductor", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """A committed transfer, before it becomes a report; a worker stood for `stood_s` to install its last portion."""

    tensors: LazyTensorReports
    bytes_sent: int
    seconds: dict[str, float]
    stood_s: float


class Conductor:
    """Leads the workers of all engines and the trainer's other ranks.

    Args:
        member: this rank.
        recipe: what the engine is to hold.
        trainers: ranks of the trainer, this one included.
        engines: workers of each engine; engine ranks are numbered through.
        bucket_bytes: payload of a message.
        timeout_s: limit of every wait.
        transport: `auto` or a name (`outgoing`).
        commit: how versions are installed (`link.commit`).
    """

    def __init__(
        self,
        member: Member,
        recipe: Recipe,
        trainers: int,
        engines: Sequence[int],
        bucket_bytes: int,
        timeout_s: float,
        transport: str,
        commit: str,
    ) -> None:
        self._member, self._recipe = member, recipe
        self._peers = Peers(trainers, engines, timeout_s)
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s
        self._seats: dict[str, list[Seat]] = {}
        self._engine_boxes = Manifest({})
        self._nodes: list[tuple[int, str]] = []
        self._feeding = ""
        self._short: dict[int, str] = {}
        self._wanted, self.transport, self.transport_reason = transport, "", ""
        self._wanted_commit, self.commit_kind, self.commit_reason = commit, "", ""
        self.faults: list[Fp8SyncError] = []
        self.decided = False
        self.sends_kv_scales = False
        self.connecting = Laps()
        self.strategies = ""
        self._sent: list[Sent] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._invitation: Invitation | None = None
        self._audited: dict[str, list[int]] = {}
        self._ledger: Ledger | None = None
        self._interrupt: Fp8SyncError | None = None
        self._awaited = False

    @property
    def plan(self) -> Plan:
        """The agreed plan."""
        return self._member.plan

    @property
    def manifests(self) -> dict[str, Manifest]:
        """What all ranks of the `trainer` hold, and what all workers of the `engine` want."""
        return {"trainer": self._member.held, "engine": self._engine_boxes}

    @property
    def portions(self) -> int:
        """In how many portions a version is sent and installed; one where it is staged."""
        return self._member.portions

    @property
    def peers(self) -> Peers:
        """Everyone who has joined, and what workers said of their engines then."""
        return self._peers

    @property
    def lost(self) -> Fp8SyncError | None:
        """The loss of workers among the faults of the version that is open, all of them by name.

        An engine ends its other workers when one dies, so the first that is missed need not be that one.
        """
        found = [fault for fault in self.faults if isinstance(fault, EngineLost)]
        return gathered(found) if found else None

    @property
    def hung_up(self) -> bool:
        """Whether a worker has left for another process's link, or somebody is gone."""
        left = any(channel.hung_up() for channel in self._peers.each("engine"))
        return left or bool(self._peers.lost)

    def agree(self, listener: Listener) -> None:
        """Take everyone's manifest, build the plan, compare digests, open the transport."""
        try:
            self._agree(listener)
        # Peers hear of anything at once, instead of waiting for a message that will not come.
        except Exception as error:
            listener.close()  # for whoever has not been heard yet
            told = self._cause(named_error(error, 0))
            for channel in self._peers.all:
                channel.try_send({"type": "error", "error": told.to_wire()})
            self._member.close()  # its caller may have done so while it opened
            raise

    def open(self, version: int, portion: int = 0, *, audit: bool = False) -> None:
        """Announce a version, or one of its later portions.

        Trainers begin to send; workers read it in `start_weight_update`.
        """
        self.faults = []
        message = {"type": "version", "version": version, "portion": portion, "audit": audit}
        for channel in self._peers.all:
            channel.send(message)
        if audit:
            self._ledger = self._member.ledger()

    def audit(self) -> AuditReport:
        """Compare what all trainer ranks and workers hold; workers answer in `finish_weight_update`."""
        if self._ledger is None:
            raise Fp8SyncError("no audit was opened")
        own, self._ledger = self._ledger, None
        auditor = Auditor(self.plan, self._bucket_bytes, own, self._peers.channels, self._audited)
        report = auditor.run()
        self._audited = auditor.expected
        self._peers.tell("trainer", {"type": "audited", "report": report.to_json()})
        return report

    def send(self, version: int, portion: int = 0) -> None:
        """Send this rank's share of a portion, and wait until every worker has verified what all ranks sent.

        Faults are kept for `commit`, so that every worker hears of them.
        """
        began = self._member.announced = time.perf_counter()
        sent = [self._member.send(version, portion, self._pass_on)]
        said, lost = self._peers.hear("trainer", "sent")
        sent += [Sent.from_json(message) for message in said]
        sent_s = time.perf_counter() - began
        faults = lost + failures(sent) or nonfinite(sent)
        self.faults = with_refusals(faults, self._peers.votes())
        verified = time.perf_counter()
        if self._nodes:
            self._forward()
        if portion == 0:
            self._sent, self._seconds = [], defaultdict(float)
        self._sent += sent
        self._seconds["quantize"] += max(s.quantize_s for s in sent)
        self._seconds["send"] += max(s.send_s for s in sent)
        self._seconds["verify"] += verified - began - sent_s
        self._seconds["forward"] += time.perf_counter() - verified

    def _forward(self) -> None:
        """Workers hand on to one another what trainer ranks sent, once all of it is verified."""
        go = not self.faults
        self._peers.spread("engine", {"type": "forward", "go": go})
        if go:
            # A worker that stopped because another one did says less than that one.
            self.faults = sorted(
                self._peers.votes(patience=2), key=lambda error: isinstance(error, PeerFailed)
            )

    def _pass_on(self, written: Written | None) -> None:
        """This rank has written a part: once the others have theirs, workers verify it."""
        said, lost = self._peers.hear("trainer", "written")
        theirs = (m["ranks"] and dict(zip(m["ranks"], m["attached"], strict=True)) for m in said)
        shares = [written, *theirs]
        whole = not lost and all(share is not None for share in shares)
        for rank, channel in enumerate(self._peers.each("engine")):
            digests = [share[rank] for share in shares if share] if whole else []
            channel.try_send({"type": "written", "whole": whole}, digests)

    def abandon(self, error: BaseException) -> None:
        """Tell the trainer's other ranks why a version will not be decided."""
        self._peers.spread("trainer", {"type": "error", "error": as_ours(error).to_wire()})

    def interrupt(self, error: BaseException) -> Fp8SyncError | None:
        """Let a call in another thread end soon; the trainer's other ranks hear of `error` as the reason.

        What workers have said before is still heard.

        Returns:
            What had gone wrong before, which is then the reason instead.
        """
        reason = as_ours(error)
        reason.severed = True  # what workers say from now on stays in the channels
        self._interrupt = None if self.faults else reason
        self._peers.interrupt()
        return gathered(self.faults) if self.faults else None

    def _cause(self, error: Fp8SyncError) -> Fp8SyncError:
        """Return why workers were interrupted in the place of an error that only says that they were."""
        if self._interrupt is None or not isinstance(error, EngineLost):
            return error
        return self._interrupt

    def conclude(self, error: BaseException | None = None) -> None:
        """Tell the trainer's other ranks, if they wait for it, how a portion has ended."""
        if self._awaited:
            told = as_ours(error).to_wire() if error else None
            self._peers.spread("trainer", {"type": "outcome", "error": told})
        self._awaited = False

    def refuse(self, error: Fp8SyncError) -> None:
        """Let `commit` fail with `error`, so that all hear of it."""
        self.faults.append(error)

    def commit(self) -> Outcome:
        """Lead the two-phase commit of a portion; the workers are in `finish_weight_update` meanwhile.

        The trainer's other ranks hear of a failure here, and of success in `conclude`.

        Returns:
            What was sent of the version so far.

        Raises:
            Fp8SyncError: of the kind that stopped the refit; every worker has kept its old weights,
                unless `decided` says that they were told to install.
        """
        began = time.perf_counter()
        self.decided = False
        self._peers.spread("engine", {"type": "prepare", "go": not self.faults})
        prepared = self._peers.votes()
        faults = self.faults or prepared
        prepare_s = time.perf_counter() - began
        self.decided = not faults
        self._peers.spread("engine", {"type": "decision", "commit": self.decided})
        done: list[Message] = []
        if self.decided:
            done, lost = self._peers.hear("engine", "committed")
            faults = broken(done, [*dict.fromkeys(map(self._cause, lost))])
        self._awaited = True
        if faults:
            error = gathered(faults)
            self.conclude(self._cause(error))
            raise error
        self._seconds["prepare"] += prepare_s
        self._seconds["commit"] += max(float(said["commit_s"]) for said in done)
        parts = tuple(part for share in self._sent for part in share.parts)
        tensors = LazyTensorReports(self.plan, parts)
        stood_s = max(float(said["stood_s"]) for said in done)
        return Outcome(tensors, sum(s.bytes for s in self._sent), dict(self._seconds), stood_s)

    def close(self) -> None:
        """Hang up; a thread that waits for a peer wakes with `EngineLost`."""
        self._peers.close()
        self._member.close()
        self._invitation = None

    def _agree(self, listener: Listener) -> None:
        laps = self.connecting = Laps()
        self._peers.accept(listener)
        laps.end("join")
        held = merge_ranks([self._member.source.manifest(), *self._manifests("trainer")])
        self._member.source.check(held)
        opening: Message = {"type": "source", "manifest": held.to_json()}
        opening |= {"recipe": self._recipe.to_json(), "bucket_bytes": self._bucket_bytes}
        team = {"team": secrets.token_hex(8), "host": listener.host}
        self._peers.tell("engine", opening)
        laps.end("gather")
        # The rest while workers trace: indexing here, and reading on the trainer's other ranks.
        self._peers.tell("trainer", {**opening, **team})
        self._member.learn(held, self._recipe)
        laps.end("learn")
        wanted = self._engine_boxes = merge_ranks(self._manifests("engine"))
        laps.end("trace")
        self.commit_kind, self.commit_reason = choose_commit(self._wanted_commit, self._short)
        check_all_used(wanted)
        self._peers.tell("trainer", {"type": "destination", "manifest": wanted.to_json()})
        plan = self._feed(self._member.make_plan(wanted))
        self.sends_kv_scales = any(map(is_kv_scale, plan.tensors.values()))
        sent: dict[int, list[Copy]] = defaultdict(list)
        for copy in plan.copies if self._nodes else ():
            sent[copy.source_rank].append(copy)
        # Who could not plan says so where its digests are due.
        for rank, channel in enumerate(self._peers.each("trainer"), 1):
            channel.try_send({"type": "forwarded", "marks": marks_of(sent[rank])})
        self._compare(plan)
        laps.end("plan")
        self._open_transport(plan, **team)
        laps.end("open")
        ready = {member: c.receive("ready") for member, c in sorted(self._peers.channels.items())}
        engines = [said for (role, _), said in ready.items() if role == "engine"]
        self.strategies = strategies_of(engines)
        laps.end("ready")

    def _feed(self, plan: Plan) -> Plan:
        """Decide what workers of one node hand on to one another, and tell them who wants what they want."""
        trainers = [self._member.seat, *self._seats["trainer"]]
        engines = dict(enumerate(self._seats["engine"]))
        feeding = choose_feeding(self._wanted, plan, trainers, engines, self._bucket_bytes)
        if self.commit_kind == "in-place":
            feeding = Feeding(
                plan, "nothing is forwarded in place: workers may be at other portions"
            )
        for rank, channel in enumerate(self._peers.each("engine")):
            runs = as_runs(feeding.sharers.get(rank, ()))
            misc = taken_whole(self._engine_boxes, rank)
            channel.send({"type": "shared", "runs": runs, "misc": misc})
        self._nodes, self._feeding = list(feeding.nodes.items()), feeding.reason
        return self._member.adopt(feeding.plan)

    def _manifests(self, role: str) -> list[Manifest]:
        found, refused = self._peers.hear(role, "manifest")
        if refused:
            raise gathered(refused)
        self._seats[role] = [Seat(**said["seat"]) for said in found]
        self._short = {rank: said.get("short", "") for rank, said in enumerate(found)}
        return [Manifest.from_json(said["manifest"]) for said in found]

    def _compare(self, plan: Plan) -> None:
        """Every peer's digests of its part of the plan must equal ours, which are made while they make theirs.

        A worker's part is what arrives at it, a trainer rank's what it sends and how amax is exchanged.
        """
        workers = [rank for role, rank in self._peers.channels if role == "engine"]
        own = {rank: plan.digest(rank) for rank in workers}
        amax = plan.amax_digest()
        for (role, rank), channel in sorted(self._peers.channels.items()):
            mine = {str(rank): own[rank]} if role == "engine" else {"amax": amax}
            if role == "trainer":
                mine |= {str(to): share for to, share in plan.share_digests(rank).items()}
            found = channel.receive("plan")["digests"]
            channel.send({"type": "agreed", "digests": mine, "commit": self.commit_kind})
            if found != mine:
                theirs = channel.receive("digests")["digests"]
                source = rank if role == "trainer" else None
                raise difference(plan, theirs, channel.peer, source)

    def _open_transport(self, plan: Plan, team: str, host: str) -> None:
        engine = dict(enumerate(self._peers.each("engine")))
        places = {rank: channel.receive("place") for rank, channel in engine.items()}
        seats = [self._member.seat, *self._seats["trainer"]]
        try:
            kind, reason = choose_transport(self._wanted, plan, seats, places)
        except ValueError as error:
            raise UnsupportedLayout(str(error)) from error
        peers = {member: channel.peer for member, channel in self._peers.channels.items()}
        forward = forward_bytes(kind, plan, self._bucket_bytes) if self._nodes else 0
        sizes = {"bucket_bytes": self._bucket_bytes, "forward_bytes": forward}
        carrier = "gloo" if not_linked(seats, places) else "nccl"
        portions: tuple[Plan, ...] = ()
        if kind in {"gloo", "nccl"}:  # in buckets, whose headers speak of all copies
            portions = in_portions(plan, {r: place["portions"] for r, place in places.items()})
        messages = [messages_of(own, places, self._bucket_bytes) for own in portions]
        orders = [in_order(listed) for listed in messages] if kind == "nccl" else []
        stamps = [stamps_of(*both) for both in zip(portions, messages, strict=True)]
        about = peers, places, sizes, carrier, orders, stamps
        self._invitation = Invitation(kind, host, self._timeout_s, *about)
        for member, channel in self._peers.channels.items():
            channel.send(self._invitation.to(*member))
        invited = self._invitation.to("trainer", 0)
        self._member.open(invited, self._bucket_bytes, self._timeout_s, team, host)
        self.transport, self.transport_reason = kind, f"{reason}; {self._feeding}"
