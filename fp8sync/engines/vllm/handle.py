"""What every vLLM handle has: its update calls, a stop between two steps, and one link at a time."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

from fp8sync.engines.vllm.answers import settled
from fp8sync.engines.vllm.compat import has_our_backend
from fp8sync.errors import (
    Fp8SyncError,
    InstallFailed,
    RefitInProgress,
    TransferTimeout,
    UnsupportedLayout,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

__all__ = [
    "Handle",
    "InFlight",
    "check_backend",
    "check_emptied",
    "check_in_flight",
]

InFlight = Literal["wait", "keep", "recompute", "abort"]
"""What becomes of requests in flight: they finish with the old weights before the commit (`wait`), they
are frozen and go on with the new ones, with the keys and values that they have (`keep`) or with new ones of all
their tokens (`recompute`), or they end where they are (`abort`). Handles are asked for `recompute` as `keep`, and
to forget stale keys and values."""

_LESS = 3
"""By what a call is given less time once another one was not answered."""


class Seat:
    """Who may talk to an engine: one link at a time, and workers know only the latest."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.link: object = None
        self.settled: object = None
        """The link of this process that has stopped it last, and resumed it."""


_of_objects: WeakKeyDictionary[Any, Seat] = WeakKeyDictionary()
_of_servers: dict[str, Seat] = {}


def _seat_at(engine: Any) -> Seat:
    seats: Any = _of_servers if isinstance(engine, str) else _of_objects
    return seats.setdefault(engine, Seat())


class Handle(ABC):
    """A vLLM engine as the trainer holds it.

    Args:
        engine: the engine object, or the server's address.
        workers: all of its workers.
    """

    timeout_s = 600.0
    in_process = False
    """Whether the engine runs in this process, and answers in the thread that asks."""
    replicas = 1
    """Data-parallel ones, which vLLM may let step together."""
    late = False
    """Whether a call was not answered in time, since somebody last began to refit, connect or audit."""

    def __init__(self, engine: Any, workers: int) -> None:
        self.workers = workers
        self.seat = _seat_at(engine)
        self._stays = self._owed = False
        self._can_renew = self._renews = False
        """Whether the engine empties its prefix cache when it installs weights: at all, and those under way."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Workers of each engine behind this handle."""
        return (self.workers,)

    def limit(self, seconds: float) -> None:
        """Set the limit of every single call."""
        self.timeout_s = seconds

    @property
    def patience_s(self) -> float:
        """The limit of the next call: less, once one was not answered."""
        return self.timeout_s / _LESS if self.late else self.timeout_s

    def answered(self, answer: Future[Any], method: str, is_dead: Callable[[], bool]) -> Any:
        """Wait for the answer to a call, and remember if none comes."""
        try:
            return settled(answer, method, self.patience_s, is_dead)
        except TransferTimeout:
            self.late = True
            raise

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other links of this process off the engine.

        Raises:
            RefitInProgress: one is refitting or connecting.
        """
        if not self.seat.lock.acquire(blocking=False):
            raise RefitInProgress("the engine is already being refitted or connected")
        self.late = False
        try:
            yield
        finally:
            self.seat.lock.release()

    def claim(self, token: object) -> None:
        """Make the link that holds `token` the one that this engine follows."""
        self.seat.link = token

    def follows(self, token: object) -> bool:
        """Whether no other link has claimed the engine since."""
        return self.seat.link is token

    def check_host(self, host: str) -> None:  # noqa: B027  (most engines are on this host)
        """Refuse an address for the rendezvous that the workers cannot reach."""

    def check_requests(self, in_flight: InFlight) -> None:  # noqa: B027  (most engines step their own)
        """Refuse to wait for requests that nobody steps."""

    def check_held(self) -> None:  # noqa: B027  (most have no owner who pauses them)
        """Refuse to wait for requests of an engine that its owner has paused."""

    @abstractmethod
    def initialize(self, info: dict[str, Any]) -> None:
        """Let every worker join a link; blocks until they have agreed or refused."""

    def restore_kv_scales(self) -> None:
        """Give every worker's devices the KV-cache scales that its hosts hold; needs no link.

        vLLM fills them with 1.0 when it wakes a sleeping cache.
        """
        with self.exclusive():
            self.initialize({"woken": True})

    @abstractmethod
    def start(self) -> None:
        """Open a version on every worker."""

    @abstractmethod
    def update(self, version: int, *, renew: bool = False) -> None:
        """Block until every worker has received the version, or failed to.

        Args:
            version: its number.
            renew: whether the engine is to empty its prefix cache when it installs it, and requests keep their
                blocks; one that cannot has it emptied by `reset_caches`.
        """

    def note_update(self, version: int, renew: bool) -> dict[str, Any]:
        """Note whether the engine renews its cache with this update, and return what vLLM is told of it."""
        self._renews = renew and self._can_renew
        return {"version": version, "renew": self._renews}

    @abstractmethod
    def finish(self) -> None:
        """Let every worker install or abandon the version."""

    def close_update(self, version: int) -> None:
        """End vLLM's update where one was opened.

        Not of an engine that does not answer: whoever connects next does.
        """
        for call in (partial(self.update, version), self.finish):
            if not self.late:
                with suppress(Exception):
                    call()

    @abstractmethod
    def pause(self, in_flight: InFlight, *, once: bool) -> float | None:
        """Stop scheduling; on return nothing is computed.

        Args:
            in_flight: what becomes of requests.
            once: whether a single `finish` is all that follows before `resume`: vLLM makes a call between two
                steps, so an engine with nothing to change but weights need not be stopped for it.

        Returns:
            Since when it stands (`time.perf_counter`), as far as vLLM says; None if it was not stopped.

        Raises:
            TransferTimeout: requests in flight did not end in time (`wait`).
        """

    @abstractmethod
    def resume(self) -> None:
        """Go on scheduling, whether it was stopped or not."""

    def paused(self) -> bool:
        """Whether its owner has paused it, or parts of it are still asleep.

        Requests may be stepped all the same: vLLM calls itself paused while it lets them end (`wait`), too.
        """
        return False

    def learn(self, stoppers: Sequence[str], renews: Sequence[bool]) -> None:
        """Take over what a link owes that has stopped it and is gone.

        Args:
            stoppers: of each engine, the last link that has not told its workers that it goes on, or "".
            renews: of each engine, whether it empties its prefix cache when it installs weights.
        """
        self._can_renew = renews[0]
        self._owed = stoppers[0] not in {"", self.seat.settled}

    @property
    def owes(self) -> bool:
        """Whether it was left stopped, and not by its owner."""
        return self._owed

    def repay(self) -> bool:
        """Resume it if that is owed; returns whether nothing is owed now."""
        if self._owed:
            with suppress(Exception):
                self._release()
        return not self._owed

    def look(self) -> tuple[bool, ...]:
        """Learn whether somebody else has stopped it, who shall let it go on; of each engine.

        What is not stopped by somebody else is to be resumed from now on.
        """
        self._stays = not self._owed  # so it is left as it is if it does not answer
        self._stays = self._stays and self.paused()
        self._owed = not self._stays
        if self._owed:
            self.seat.settled = None
        return (self._stays,)

    def stop(self, in_flight: InFlight, *, once: bool) -> float | None:
        """Stop it between two steps, also where somebody else has paused it: that pause may still let requests end.

        Such requests are frozen (`keep`). To end (`wait`), they would need an engine that goes on, so there
        must be none: looked for before, to disturb nothing, and when nothing is stepped any more.

        Returns:
            As `pause` does.

        Raises:
            Fp8SyncError: it holds requests, or does not say whether it does (`wait`).
        """
        if in_flight == "recompute":
            return self.pause("keep", once=False)
        if not self._stays or in_flight != "wait":
            return self.pause(in_flight, once=once and not self._stays)
        self.check_held()
        since = self.pause("keep", once=once)
        self.check_held()
        return since

    def forget(self, in_flight: InFlight, *, stale: bool) -> None:
        """Reset its caches.

        Requests of an engine that somebody else has stopped were kept at least. They are recomputed: a prompt may
        be half computed (`wait`), and the KV cache may be asleep.
        """
        if in_flight == "recompute" or (self._stays and in_flight != "abort"):
            self.reset_caches("keep", stale=True)
        else:
            self.reset_caches(in_flight, stale=stale)

    def go_on(self) -> None:
        """Resume an engine that was going on when it was looked at."""
        if not self._stays:
            self._release()

    def _release(self) -> None:
        """Resume what was paused here; should it refuse, the next refit does."""
        self._stays, self._owed = False, True
        self.resume()
        self._owed, self.seat.settled = False, self.seat.link

    @contextmanager
    def resuming(self, unless: Callable[[], bool], then: Callable[[], None]) -> Iterator[None]:
        """Let it go on after a failure.

        Args:
            unless: whether it stays as it is.
            then: called once it goes on.
        """
        try:
            yield
        except BaseException:
            if not unless():
                with suppress(Exception):
                    self.go_on()
                    then()
            raise

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Let replicas compute nothing meanwhile.

        Experts let them step together: one, in a call that waits for all workers, would wait for another
        whose step waits for it.
        """
        if self.replicas == 1:
            yield
            return
        if self.paused():
            self.pause("keep", once=False)  # as requests may be stepped
            yield
            return
        try:
            self.pause("keep", once=False)
            yield
        except BaseException:
            with suppress(Exception):
                self._release()
            raise
        self._release()

    def halt(self) -> None:
        """Stop an engine that may hold parts of two versions, and what of it answers forgets the old one."""
        with suppress(Exception):
            self.pause("keep", once=False)
        with suppress(Exception):
            self.reset_caches("keep", stale=True)

    @abstractmethod
    def reset_caches(self, in_flight: InFlight, *, stale: bool) -> None:
        """Forget what was computed with the old weights.

        Prefixes, in the scheduler and in external caches, and what an encoder made of pictures.

        Args:
            in_flight: what became of requests; those that are kept are recomputed, unless the engine has renewed
                its cache by itself.
            stale: whether their keys and values cannot be read any more, also of an engine that caches none.

        Raises:
            InstallFailed: vLLM kept them, because requests hold some.
        """

    @abstractmethod
    def last_label(self) -> int:
        """The number by which vLLM knows its weights; 0 for another name, or where it keeps none."""

    @abstractmethod
    def label(self, version: str) -> bool:
        """Name the engine's weights; False where vLLM keeps no such label (before 0.27)."""


def check_backend(config: Any) -> None:
    """Raise UnsupportedLayout for a vLLM config without this backend."""
    if not has_our_backend(config):
        found = getattr(config.weight_transfer_config, "backend", None)
        raise UnsupportedLayout(
            "the engine was not made for fp8sync: expected "
            f"weight_transfer_config={{'backend': 'fp8sync'}}, found backend {found!r}"
        )


def check_emptied(call: Callable[[], object]) -> None:
    """Let vLLM empty its prefix cache.

    Args:
        call: into vLLM.

    Raises:
        InstallFailed: vLLM answers that it did not, or raises.
        Fp8SyncError: as `call` raises it.
    """
    said = ""
    try:
        if call() is not False:
            return
    except Fp8SyncError:
        raise
    # vLLM's own, of a class that each version may choose.
    except Exception as error:  # noqa: BLE001
        said = f" (vLLM says: {error})"
    raise InstallFailed(
        f"vLLM kept prefixes of the old weights; expected an empty prefix cache{said}"
    )


def check_in_flight(mode: str) -> None:
    """Raise ValueError for an unknown mode."""
    if mode not in get_args(InFlight):
        known = ", ".join(get_args(InFlight))
        raise ValueError(f"unknown in_flight {mode!r}; known: {known}")
