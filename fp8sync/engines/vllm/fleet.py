"""Several engines as one: every call goes to all of them at once, an error says which engine it was."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, TypeVar

from fp8sync.engines.vllm.answers import in_thread, settle
from fp8sync.engines.vllm.handle import Handle, InFlight
from fp8sync.errors import (
    EngineLost,
    Fp8SyncError,
    TransferTimeout,
    UnsupportedLayout,
    gathered,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["Fleet"]

T = TypeVar("T")

_CALLS = 4
"""More calls into one engine, each with its own limit, than a step of a refit makes."""


class Fleet(Handle):
    """Engines that are refitted together, their workers numbered through.

    Calls block until every engine has answered, also where one has failed: a failed engine never leaves
    another in the middle of an update.

    Args:
        engines: two or more; at most one of them in this process, since vLLM keeps global state.

    Raises:
        UnsupportedLayout: an engine is listed twice, or two live in this process.
    """

    def __init__(self, engines: Sequence[Handle]) -> None:
        local = [number for number, engine in enumerate(engines) if engine.in_process]
        if len(local) > 1:
            raise UnsupportedLayout(
                f"engines {local} of the list live in this process: expected at most one of them "
                "without a process of its own"
            )
        if len({id(engine.seat) for engine in engines}) < len(engines):
            raise UnsupportedLayout("an engine is listed twice")
        self._engines = engines

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(engine.workers for engine in self._engines)

    def limit(self, seconds: float) -> None:
        for engine in self._engines:
            engine.limit(seconds)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self._engines:
                stack.enter_context(engine.exclusive())
            yield

    def claim(self, token: object) -> None:
        for engine in self._engines:
            engine.claim(token)

    def follows(self, token: object) -> bool:
        return all(engine.follows(token) for engine in self._engines)

    def check_host(self, host: str) -> None:
        self._each(lambda engine: engine.check_host(host))

    def check_requests(self, in_flight: InFlight) -> None:
        self._each(lambda engine: engine.check_requests(in_flight))

    def initialize(self, info: dict[str, Any]) -> None:
        first = dict(zip(self._engines, accumulate(self.sizes, initial=0), strict=False))
        self._each(lambda engine: engine.initialize({**info, "first_rank": first[engine]}))

    def start(self) -> None:
        self._each(lambda engine: engine.start())

    def update(self, version: int, *, renew: bool = False) -> None:
        self._each(lambda engine: engine.update(version, renew=renew))

    def finish(self) -> None:
        self._each(lambda engine: engine.finish())

    def close_update(self, version: int) -> None:
        self._each(lambda engine: engine.close_update(version))

    def pause(self, in_flight: InFlight, *, once: bool) -> float | None:
        return _first(self._each(lambda engine: engine.pause(in_flight, once=once)))

    def learn(self, stoppers: Sequence[str], renews: Sequence[bool]) -> None:
        for engine, stopper, renewing in zip(self._engines, stoppers, renews, strict=True):
            engine.learn([stopper], [renewing])

    @property
    def owes(self) -> bool:
        return any(engine.owes for engine in self._engines)

    def repay(self) -> bool:
        return all(self._each(lambda engine: engine.repay()))

    def look(self) -> tuple[bool, ...]:
        return tuple(chain.from_iterable(self._each(lambda engine: engine.look())))

    def stop(self, in_flight: InFlight, *, once: bool) -> float | None:
        return _first(self._each(lambda engine: engine.stop(in_flight, once=once)))

    def resume(self) -> None:
        self._each(lambda engine: engine.resume())

    def go_on(self) -> None:
        self._each(lambda engine: engine.go_on())

    @contextmanager
    def standing(self) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self._engines:
                stack.enter_context(engine.standing())
            yield

    def reset_caches(self, in_flight: InFlight, *, stale: bool) -> None:
        self._each(lambda engine: engine.reset_caches(in_flight, stale=stale))

    def forget(self, in_flight: InFlight, *, stale: bool) -> None:
        self._each(lambda engine: engine.forget(in_flight, stale=stale))

    def last_label(self) -> int:
        return max(self._each(lambda engine: engine.last_label()))

    def label(self, version: str) -> bool:
        return all(self._each(lambda engine: engine.label(version)))

    def _each(self, call: Callable[[Handle], T]) -> list[T]:
        """Call all engines at once, an engine of this process in the caller's thread.

        Raises:
            Fp8SyncError: of the first engine that is lost, or else of the first that failed, with what
                the others say.
            Exception: another one, where no engine raised such.
        """
        here = next((e for e in self._engines if e.in_process), self._engines[0])
        answers = {e: in_thread(partial(call, e)) for e in self._engines if e is not here}
        answers[here] = Future()
        settle(answers[here], partial(call, here))
        errors: list[BaseException] = []
        for number, engine in enumerate(self._engines):
            error = _error_of(answers[engine], _CALLS * engine.timeout_s)
            if isinstance(error, Fp8SyncError):
                errors.append(error.named(f"engine {number} of the list: {error.summary}"))
            elif error is not None:
                errors.append(error)
        if errors:
            known = [e for e in errors if isinstance(e, Fp8SyncError)]
            known.sort(key=lambda e: not isinstance(e, EngineLost))
            raise gathered(known) if known else errors[0]
        return [answers[engine].result() for engine in self._engines]


def _first(times: Iterable[float | None]) -> float | None:
    """Since when one of them stands, or None where none does."""
    return min((since for since in times if since is not None), default=None)


def _error_of(answer: Future[Any], timeout_s: float) -> BaseException | None:
    """Return what a call raised, or that it did not end in time."""
    try:
        return answer.exception(timeout_s)
    except FutureTimeout:
        return TransferTimeout(f"it did not answer within {timeout_s:g} s")
