"""The story of a refit, on one page, as the trainer tells it.

The workers receive in threads of their own from `start` on, so the engine generates on until it is
paused. vLLM's calls block; where a worker needs an answer meanwhile, a second thread gives it.

    caller      init              start   send: quantize, write    pause  finish  reset caches  resume
    2nd thread  manifests, plan,                                          two-phase commit
                digests, transport
"""

from __future__ import annotations

import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fp8sync.collector import uncollected
from fp8sync.control import Listener
from fp8sync.engines.vllm import as_engine, check_in_flight
from fp8sync.errors import EngineLost, Fp8SyncError
from fp8sync.link.commit import (
    AFTER_DECISION,
    CLOSED,
    closed_meanwhile,
    emptying,
    half_installed,
    letting_go_on,
    unusable,
)
from fp8sync.link.conductor import Conductor
from fp8sync.link.described import Described
from fp8sync.link.member import Member
from fp8sync.link.together import together
from fp8sync.report import RefitReport
from fp8sync.sending.share import named_error
from fp8sync.sources import LiveSource, as_source
from fp8sync.trainers import Opening, rank_and_size, this_process
from fp8sync.transport.rendezvous import bound_address
from fp8sync.waiting import HostTime, waiting

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from fp8sync.audit.report import AuditReport
    from fp8sync.engines.vllm import InFlight
    from fp8sync.link.commit import Commit
    from fp8sync.link.conductor import Outcome
    from fp8sync.recipe import Recipe

__all__ = ["Link"]

T = TypeVar("T")


class Link(Described):
    """A trainer's model and an engine that agree on a plan; made by `connect`.

    Examples:
        >>> with fp8sync.connect(model, llm) as link:  # doctest: +SKIP
        ...     print(link.transport, link.commit, link.plan.explain())
    """

    def __init__(
        self,
        model: Any,
        engine: Any,
        recipe: Recipe,
        timeout_s: float,
        host: str,
        bucket_bytes: int,
        transport: str,
        commit: Commit,
        opening: Opening,
    ) -> None:
        self._transport, self._wanted_commit = transport, commit
        self._model = model
        self._name = secrets.token_hex(8)
        self._engine = as_engine(engine)
        self._host = bound_address(host)
        self._engine.check_host(self._host)
        # A call holds at most: waits for two messages, and vLLM's own work.
        self._engine.limit(3 * timeout_s)
        self.recipe = recipe
        self.version = 0
        self._timeout_s, self._bucket_bytes = timeout_s, bucket_bytes
        self._closed = threading.Event()
        self._mixed = False
        """Whether the engine holds parts of two versions, or what was computed with another one."""
        self._conductor: Conductor | None = None
        with self._engine.exclusive():
            self._connect(opening)

    def refit(self, in_flight: InFlight = "wait") -> RefitReport:
        """Move the model's weights, as they are now, into the engine.

        Args:
            in_flight: requests that the engine works on when the bytes are there: `wait` until they
                end with the old weights (within the link's timeouts), `abort` them, or `keep` them: they go on
                with the new, computed anew with `recompute` (docs/architecture.md). New ones queue up meanwhile. An
                engine that was paused before, or is awake in parts alone, stays so; `wait` is refused if some have begun.

        Returns:
            What was done. On return the engine serves the new version, with an empty prefix cache.

        After an error the engine serves its old weights, if it serves at all; not so after `EngineUnusable`, and after
        an `EngineLost` whose message says that installing had begun. Then it may hold parts of both versions, or caches
        of the old (only these, if `version` is new). An `AsyncLLM` or a server stays paused, and an `LLM` must not be
        used, until a complete refit has succeeded; `wait` then freezes requests, like `keep`. Nor after an
        `Fp8SyncError` that says that the new weights are installed: they are, but an engine that could not be told to
        go on stands until the next refit.

        Raises:
            ValueError: unknown `in_flight`.
            NonFiniteWeight: NaN or Inf, naming every tensor.
            CorruptBucket, InstallFailed, TransferTimeout, EngineLost, PeerFailed: see `fp8sync.errors`.
            EngineUnusable: something went wrong after all had agreed to install (`in-place`: a portion); says what.
            RefitInProgress: the engine is already being refitted or connected.
            Fp8SyncError: the link is or was closed; `wait` for requests that nobody steps; or as `connect`, where
                another link has had the engine or the last refit lost a peer.

        Examples:
            >>> link.refit("keep").version  # doctest: +SKIP
            2
        """
        check_in_flight(in_flight)
        with Opening() as opening, self._engine.exclusive():
            if self._closed.is_set():
                raise Fp8SyncError("this link was closed; connect again")
            if self._has_engine():
                opening.say({"link": self._name})
            else:
                self._disconnect()
                self._connect(opening)
            conductor, before = self._connected(), self.version
            try:
                report = self._refit(conductor, in_flight)
            except BaseException as error:
                conductor.conclude(error)
                # A peer that was late may still be writing; and who stopped the engine is asked anew.
                owes = self._engine.owes and conductor.peers.stopping
                if getattr(error, "severed", False) or owes or self._closed.is_set():
                    self._disconnect()
                closed = self._closed.is_set() and isinstance(error, Exception)
                if closed and self.version == before:
                    raise closed_meanwhile(error, mixed=self._mixed) from error
                raise
            conductor.conclude()
            return report

    def audit(self) -> AuditReport:
        """Compare what workers hold, read out of their live memory, with the model's weights, as they are now.

        A collective, like `refit`. The engine stands still meanwhile; nothing is changed.

        Returns:
            Digests of every tensor on every worker, and what differs; `report.explain()` as text.

        Raises:
            TransferTimeout, EngineLost: a peer did not answer, or is gone; or another link has the engine.
            RefitInProgress: the engine is already being refitted or connected.

        Examples:
            >>> link.audit().equal  # doctest: +SKIP
            True
        """
        with self._engine.exclusive():
            conductor = self._connected()
            if not self._has_engine():
                text = "another link has taken the engine, or a peer left; refit() connects again"
                raise EngineLost(text)
            try:
                with self._engine.standing():
                    conductor.open(self.version, audit=True)
                    self._engine.start()
                    task = self._submit(conductor.audit)
                    self._engine.update(self.version)
                    return together(task, self._engine.finish, conductor.interrupt, self._timeout_s)
            except BaseException:
                self._disconnect()  # messages of this audit may still be under way
                raise

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the engine as it is and free the link; `with connect(...) as link:` does so, too."""
        self._closed.set()
        self._disconnect()

    def let_go(self) -> None:
        """Free what was made for an engine that another link has taken; `refit` connects again."""
        if self._conductor is None or self._has_engine():
            return
        # It may be at work again; and whoever asks has done what it was asked for.
        with suppress(Exception), self._engine.exclusive():
            if not self._has_engine():
                self._disconnect()

    def _has_engine(self) -> bool:
        """Whether no other link has taken the engine, be it of this process or of another."""
        known = self._conductor
        return known is not None and self._engine.follows(self._name) and not known.hung_up

    def _connected(self) -> Conductor:
        if self._closed.is_set():
            raise Fp8SyncError(CLOSED)
        if self._conductor is None:
            raise EngineLost("the link is down; the next refit() connects again")
        return self._conductor

    def _connect(self, opening: Opening) -> None:
        token = secrets.token_hex(16)
        listener = Listener(token, self._host, self._timeout_s)
        info = {
            "host": listener.host,
            "port": listener.port,
            "token": token,
            "timeout_s": self._timeout_s,
            "owner": this_process(),
        }
        try:
            opening.say({"link": self._name, "open": info})
            source = LiveSource(partial(as_source, self._model))
            source.prepare()
            conductor = Conductor(
                Member(source, 0),
                self.recipe,
                rank_and_size()[1],
                self._engine.sizes,
                self._bucket_bytes,
                self._timeout_s,
                self._transport,
                self._wanted_commit,
            )
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="fp8sync-conductor")
            task = self._submit(partial(conductor.agree, listener))
            try:
                calls = partial(self._engine.initialize, info)

                def interrupt(error: BaseException) -> Fp8SyncError | None:
                    known = conductor.interrupt(error)
                    listener.close()
                    return known

                with uncollected(), self._engine.standing():
                    together(task, calls, interrupt, self._timeout_s)
            except BaseException:
                conductor.close()
                self._threads.shutdown(wait=False)
                raise
        finally:
            listener.close()
        self._conductor = conductor
        # What another link has made whole since is no mixture any more.
        self._mixed = conductor.peers.left_mixed or (
            self._mixed and self._engine.follows(self._name)
        )
        self._engine.claim(self._name)
        if conductor.peers.left_open:
            with suppress(Exception):  # engines of a list that have none open say so
                self._engine.finish()
        self._engine.learn(conductor.peers.stoppers, conductor.peers.renews)
        # Parts of two versions compute nothing until a complete refit.
        if any(conductor.peers.stoppers) and not self._mixed and self._engine.repay():
            conductor.peers.say_stopped("", whole=True)

    def _refit(self, conductor: Conductor, in_flight: InFlight) -> RefitReport:
        version, mixed = self.version + 1, self._mixed
        try:
            if not mixed:  # else they are frozen
                self._engine.check_requests(in_flight)
            began, host = time.perf_counter(), HostTime()
            with waiting():
                label = str(self._engine.last_label() + 1)
        except BaseException as error:
            conductor.abandon(error)
            raise
        renew = in_flight == "keep" and not (mixed or conductor.sends_kv_scales)
        self._transfer(conductor, version, renew)
        if conductor.faults:  # no reason to disturb the engine; raises what went wrong
            self._refuse(conductor)
        arrived = time.perf_counter()
        once = conductor.portions == 1 and not conductor.sends_kv_scales
        going = partial(conductor.peers.say_stopped, "", whole=True)
        with self._engine.resuming(unless=lambda: self._mixed, then=going):
            try:
                with waiting():
                    stay = self._engine.look()
                    conductor.peers.say_stopped(self._name, stay, whole=False)
                    if mixed and in_flight == "wait":
                        in_flight = "keep"  # to end, requests would need an engine that goes on
                    arrived = time.perf_counter()
                    since = self._engine.stop(in_flight, once=once)
            except BaseException as error:  # requests that do not end, say: every worker is told
                conductor.refuse(named_error(error, 0))
                with suppress(Exception) if not isinstance(error, Exception) else nullcontext():
                    self._refuse(conductor)
                raise
            drained = time.perf_counter()
            # With `wait` it generates until the last request has ended.
            stopped = arrived if since is None or in_flight != "wait" else since
            outcome = self._commit(conductor)
            self._mixed = True
            for portion in range(1, conductor.portions):
                outcome = self._install(conductor, version, renew, portion)
            self.version = version
            ended = time.perf_counter()
            with waiting(), emptying():
                self._engine.forget(in_flight, stale=mixed or conductor.sends_kv_scales)
            self._mixed = False
        conductor.peers.say_stopped(self._name, stay, whole=True)
        with waiting(), letting_go_on():
            try:
                labelled = self._engine.label(label)
            finally:
                self._engine.go_on()
                going()
        ended = ended if since is None else time.perf_counter()
        stood_s = outcome.stood_s if since is None else ended - stopped
        seconds = {**outcome.seconds, "drain": drained - arrived, "total": ended - began}
        said = outcome.tensors, label if labelled else None, host.seconds
        return RefitReport(version, outcome.bytes_sent, seconds, stood_s, *said)

    def _transfer(self, conductor: Conductor, version: int, renew: bool, portion: int = 0) -> None:
        """Send a portion of a version; returns when every worker has verified it, or said why not."""
        try:
            conductor.open(version, portion)
            with waiting():
                self._engine.start()
            conductor.send(version, portion)
            with waiting():
                self._engine.update(version, renew=renew)
        except BaseException as error:
            lost = None if isinstance(error, Fp8SyncError) else conductor.lost  # says whom
            conductor.abandon(lost or error)
            self._disconnect()
            with suppress(Exception):
                self._engine.close_update(version)
            if lost:
                raise lost from error
            raise

    def _install(self, conductor: Conductor, version: int, renew: bool, portion: int) -> Outcome:
        """Send and install a later portion, while the engine is paused."""
        portions = conductor.portions  # before a failure hangs up
        conductor.conclude()
        try:
            self._transfer(conductor, version, renew, portion)
            return self._commit(conductor)
        except Exception as error:
            raise half_installed(error, portion, portions) from error

    def _refuse(self, conductor: Conductor) -> None:
        """Let everyone hear of the faults, and raise what went wrong."""
        with ExitStack() as stack:
            with suppress(Exception):  # whether replicas can be paused or not
                stack.enter_context(self._engine.standing())
            self._commit(conductor)

    def _commit(self, conductor: Conductor) -> Outcome:
        try:
            task = self._submit(conductor.commit)
        except Fp8SyncError:
            with suppress(Exception):  # workers find that nobody decides
                self._engine.finish()
            raise
        try:
            with waiting(), uncollected():
                return together(task, self._engine.finish, conductor.interrupt, self._timeout_s)
        except BaseException as error:
            if conductor.decided:  # some workers may hold the new weights, or parts of them
                self._mixed = True
                self._engine.halt()
                if (
                    isinstance(error, Exception)
                    and (told := unusable(AFTER_DECISION, error)) != error
                ):
                    raise told from error
            raise

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        """Let the second thread make a call, unless the link was closed meanwhile."""
        with suppress(RuntimeError):  # should it be closed between the two
            if not self._closed.is_set():
                return self._threads.submit(call)
        raise Fp8SyncError(CLOSED)

    def _disconnect(self) -> None:
        if self._conductor is not None:
            self._conductor.close()
            self._conductor = None
            self._threads.shutdown(wait=False)
