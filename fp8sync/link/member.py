"""One trainer rank's part in a link, whether it leads (`conductor`) or follows (`follower`)."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING

from fp8sync.audit.trainer import trainer_ledger
from fp8sync.collector import uncollected
from fp8sync.errors import Fp8SyncError
from fp8sync.manifest import Manifest
from fp8sync.plan import Plan, Planner, in_portions
from fp8sync.sending.ahead import look_ahead
from fp8sync.sending.alike import kept_in, read_by
from fp8sync.sending.exchange import AmaxExchange, open_exchange
from fp8sync.sending.outgoing import open_senders
from fp8sync.sending.share import Outgoing, Share, named_error
from fp8sync.sending.usual import compile_writing
from fp8sync.trainers import join_team
from fp8sync.transport.memory import reader_of
from fp8sync.transport.seat import Seat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from fp8sync.audit.ledger import Ledger
    from fp8sync.plan import Copy
    from fp8sync.recipe import Recipe
    from fp8sync.sending.share import Sent, Told
    from fp8sync.sources import LiveSource
    from fp8sync.transport import Choice
    from fp8sync.wire.payload import Storages

__all__ = ["Member"]


class Member:
    """A trainer rank: its boxes, the plan it agreed on, its way out.

    Args:
        source: this rank's weights, prepared by the caller before they are read.
        rank: this rank among the trainer's.
        progress: see `Share`.
        left: whether rank 0 has left the link.
    """

    def __init__(
        self,
        source: LiveSource,
        rank: int,
        progress: Callable[[int], None] = lambda _: None,
        left: Callable[[], bool] = lambda: False,
    ) -> None:
        self.source, self.rank, self._progress, self._left = source, rank, progress, left
        self.announced = math.inf
        """When this rank was told to send (`time.perf_counter`): before it gathers anything. Workers, which wait for
        twice the limit, began to wait before."""
        self._exchange: AmaxExchange | None = None
        self._senders: Sequence[Outgoing] = ()
        self._later: list[Copy] = []
        self._plan: Plan | None = None
        self._own: Plan | None = None
        self._held = Manifest({})
        self._planner: Planner | None = None
        self._bucket_bytes = 0
        self._scales: dict[str, torch.Tensor] = {}

    @property
    def plan(self) -> Plan:
        """The plan; trainer rank 0's is of all ranks, the others' of what they send themselves."""
        if self._plan is None:
            raise Fp8SyncError("no plan yet")
        return self._plan

    @property
    def held(self) -> Manifest:
        """The boxes of all trainer ranks."""
        return self._held

    @property
    def portions(self) -> int:
        """In how many portions a version is sent, one after the other."""
        return len(self._senders)

    @property
    def seat(self) -> Seat:
        """Where this rank's weights are."""
        return Seat.at(reader_of(self.source.storages()))

    def learn(self, held: Manifest, recipe: Recipe) -> None:
        """Index what all trainer ranks hold, and compile kernels, before anyone knows what the engine wants."""
        self._held = held
        self._planner = Planner(held, exchange_amax=True, requantize=recipe.requantizes)
        compile_writing(held.tensors.values(), recipe, reader_of(self.source.storages()))

    def make_plan(self, wanted: Manifest) -> Plan:
        """Plan between all trainer ranks and all engine workers; on other ranks than 0 what this one sends."""
        if self._planner is None:
            raise Fp8SyncError("no trainer's boxes yet")
        self._plan = self._planner.plan(wanted, self.rank or None)
        self._planner = None
        return self._plan

    def adopt(self, plan: Plan) -> Plan:
        """Go by `plan`, which says what is forwarded."""
        self._plan = plan
        return plan

    def open(
        self, choice: Choice, bucket_bytes: int, timeout_s: float, team: str, host: str
    ) -> None:
        """Join the transport, and the team of ranks with which this one shares blocks.

        Args:
            choice: the invitation to the transport.
            bucket_bytes: by which an audit takes the plan apart.
            timeout_s: limit of every wait for a peer.
            team: what the link's teams are called, the same on every rank.
            host: from where the trainer's ranks are reached.
        """
        self._bucket_bytes = bucket_bytes
        storages = self.source.storages()
        # In buckets over gloo they are quantized where they lie.
        one_by_one = choice["kind"] in {"gloo", "golden"}
        device = next(iter(storages.values())).device if one_by_one else reader_of(storages)
        join = partial(join_team, self.rank, device, team, host, timeout_s)
        exchange = self._exchange = open_exchange(self.plan.amax, self.rank, device, join)
        # Some ways look at weights in a refit alone, and before it they may come to lie otherwise.
        exchange.alike.check(storages, kept_in(self._held.ranks.get(self.rank, ())))
        own = self._own = self.plan.sent_by(self.rank)
        plans = in_portions(own, dict(choice["portions"]))
        stamps = choice["stamps"] or [None] * len(plans)

        def given_up() -> bool:
            return self._left() or time.perf_counter() - self.announced > timeout_s

        about = timeout_s, exchange, self._progress, given_up
        shares = [
            Share(self.source, self.rank, self._held, plan, *about, number, stamps[number])
            for number, plan in enumerate(plans)
        ]
        later = [copy for plan in plans[1:] for copy in plan.copies]
        self._later = [copy for copy in later if copy.source_rank == self.rank]
        self._senders = open_senders(choice, shares)
        self.source.release()

    @uncollected()
    def send(self, version: int, portion: int, told: Told) -> Sent:
        """Send this rank's share of a portion of a version; an error is part of what it returns.

        With the first, it tells of NaN and Inf in all others, too.
        """
        if not self._senders:
            raise Fp8SyncError("the link was not established")
        if portion == 0:
            self.source.prepare()
        sent = self._senders[portion].send(version, told)
        if portion == 0 and sent.error is None:
            try:
                sent.parts += look_ahead(self._checked(self._later), self._later)
            except Exception as error:  # noqa: BLE001  (what stops it is told, as while it sends)
                sent.error = named_error(error, self.rank)
        if portion == self.portions - 1:
            self.source.release()
        return sent

    def ledger(self) -> Ledger:
        """Return what this rank holds, for an audit; a collective of all ranks, like a version."""
        if self._exchange is None or self._own is None:
            raise Fp8SyncError("the link was not established")
        try:
            self.source.prepare()
            storages = self._exchange.agree(partial(self._checked, self._own.copies))
        except Exception as error:
            raise named_error(error, self.rank) from error
        self.source.release()
        about = self.rank, self._own, self._bucket_bytes, self._scales
        ledger = trainer_ledger(storages, self._exchange.amax, *about)
        self._scales = ledger.scales
        return ledger

    def _checked(self, copies: Iterable[Copy]) -> Storages:
        """The weights, of which those that `copies` read lie as they did when the link was made."""
        if self._exchange is None:
            raise Fp8SyncError("the link was not established")
        return self._exchange.alike.read(self.source.storages, read_by(copies))

    def close(self) -> None:
        """Free the way out; a `send` under way ends with an error."""
        # Taken first: rank 0's thread and its caller may come at once.
        parts = *self._senders, self._exchange
        self._senders, self._exchange = (), None
        for part in parts:
            if part is not None:
                part.close()
        self.source.release()
