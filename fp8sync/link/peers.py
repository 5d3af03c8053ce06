"""Trainer rank 0's channels to everyone else: engine workers, and the trainer's other ranks.

Every wait is bounded by the link's timeout; every error names the peer.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from fp8sync.control import framed
from fp8sync.errors import EngineLost, Fp8SyncError, TransferTimeout, from_wire
from fp8sync.sending.share import named_error
from fp8sync.waiting import waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8sync.control import Channel, Listener, Message

__all__ = ["Peers"]

_AT_ONCE = 16
"""Peers that a message goes to at the same time; a thread each, and only while a link is made."""
_LEAST = 0.1
"""Of a timeout, what is left for a peer whose turn comes when it is over: to read what has arrived."""


class Peers:
    """Everyone who joins a link.

    Args:
        trainers: ranks of the trainer, rank 0 included.
        engines: workers of each engine; engine ranks are numbered through.
        timeout_s: limit of every wait.
    """

    def __init__(self, trainers: int, engines: Sequence[int], timeout_s: float) -> None:
        self._expected = {("trainer", rank) for rank in range(1, trainers)}
        self._expected |= {("engine", rank) for rank in range(sum(engines))}
        self._engine_of = [number for number, workers in enumerate(engines) for _ in range(workers)]
        self._timeout_s = timeout_s
        self.channels: dict[tuple[str, int], Channel] = {}
        self.lost: dict[tuple[str, int], Fp8SyncError] = {}
        """Why somebody was hung up on."""
        self.interrupted = False
        self.left_open = False
        """Whether an engine's update was left open by a trainer that is gone."""
        self.left_mixed = False
        """Whether a worker holds parts of two versions, be it of other links."""
        self.stopping = ""
        """The link that stops them, as workers were last told."""
        self.stoppers = [""] * len(engines)
        """Of each engine, a link that has stopped it and has not said that it goes on."""
        self.renews = [True] * len(engines)
        """Of each engine, whether it empties its prefix cache by itself when weights are installed."""

    @property
    def all(self) -> list[Channel]:
        """Everyone's channel."""
        return list(self.channels.values())

    def each(self, role: str) -> list[Channel]:
        """Return the channels of workers (`engine`), or of the trainer's other ranks, in order."""
        return [channel for (r, _), channel in sorted(self.channels.items()) if r == role]

    def accept(self, listener: Listener) -> None:
        """Wait until everyone has joined.

        Raises:
            Fp8SyncError: somebody joins twice, or is not expected.
            EngineLost, TransferTimeout: somebody does not come, or leaves; names all who have not joined.
        """
        while missing := self._expected - self.channels.keys():
            number = len(self.channels) + 1
            try:
                self._join(listener.accept(f"peer {number} of {len(self._expected)}"))
            except (EngineLost, TransferTimeout) as error:
                names = [f"{self._name(*member)} has not joined" for member in sorted(missing)]
                raise type(error)(error.summary, [*error.violations, *names]) from error

    def _join(self, channel: Channel) -> None:
        """Take in who says `join`; anyone else hears why not, and is hung up on."""
        try:
            self.channels[self._member(channel)] = channel
            if self.interrupted:  # perhaps before this one was known
                channel.deafen()
        except Exception as error:
            channel.try_send({"type": "error", "error": named_error(error, 0).to_wire()})
            channel.close()
            raise

    def _member(self, channel: Channel) -> tuple[str, int]:
        joined = channel.receive("join")
        role, rank = str(joined["role"]), int(joined["rank"])
        channel.peer = self._name(role, rank)
        if (role, rank) not in self._expected or (role, rank) in self.channels:
            raise Fp8SyncError(f"{channel.peer} joined twice, or is not expected here")
        if role == "engine":
            self.left_open |= bool(joined["updating"])
            self.left_mixed |= bool(joined["mixed"])
            number = self._engine_of[rank]
            self.stoppers[number] = self.stoppers[number] or str(joined["stopped"])
            self.renews[number] &= bool(joined["renews"])
        return role, rank

    def _name(self, role: str, rank: int) -> str:
        several = role == "engine" and rank < len(self._engine_of) and self._engine_of[-1] > 0
        return f"{role} rank {rank}" + (f" of engine {self._engine_of[rank]}" if several else "")

    def tell(self, role: str, message: Message) -> None:
        """Tell everyone of a role, several at a time: a manifest of many ranks takes its time to each.

        Raises:
            EngineLost, TransferTimeout: somebody is gone, or does not read.
        """
        channels = self.each(role)
        if not channels:
            return
        data = framed(message)
        with ThreadPoolExecutor(min(len(channels), _AT_ONCE), "fp8sync-tell") as pool:
            told = [pool.submit(channel.send_framed, data) for channel in channels]
            try:
                with waiting():
                    for each in told:
                        each.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def spread(self, role: str, message: Message) -> None:
        """Tell everyone who can be reached; who cannot is noticed when it does not answer."""
        data = framed(message)
        for channel in self.each(role):
            with suppress(EngineLost, TransferTimeout):
                channel.send_framed(data)

    def say_stopped(self, link: str, stay: Sequence[bool] = (), *, whole: bool) -> None:
        """Tell workers which link stops their engine, or "" once it goes on.

        Args:
            link: its name.
            stay: of each engine, whether it was stopped by somebody else; empty for none.
            whole: whether their weights are of one version, and nothing is kept that others have computed.
        """
        self.stopping = link
        words = {by: framed({"type": "stopped", "by": by, "whole": whole}) for by in ("", link)}
        for rank, channel in enumerate(self.each("engine")):
            by = "" if stay and stay[self._engine_of[rank]] else link
            with suppress(EngineLost, TransferTimeout):
                channel.send_framed(words[by])

    def hear(
        self, role: str, kind: str, timeout_s: float | None = None
    ) -> tuple[list[Message], list[Fp8SyncError]]:
        """Take a message of everyone who can be heard; who cannot is hung up on.

        All are due since now: those who stay silent cost one timeout, not one each. After the first one the
        others are heard at the same time, as word of their progress gives each its own time again.

        Returns:
            What was said, and why each of the others was hung up on, be it now or before.
        """
        began = time.monotonic()

        def heard(member: tuple[str, int]) -> Message | Fp8SyncError:
            channel = self.channels[member]
            limit_s = channel.timeout_s if timeout_s is None else timeout_s
            ends = max(began + limit_s, time.monotonic() + _LEAST * limit_s)
            try:
                return {"peer": channel.peer, **channel.receive(kind, limit_s, ends=ends)}
            except Fp8SyncError as error:
                channel.close()
                self.lost[member] = error
                return error

        due = [m for m in sorted(self.channels) if m[0] == role and m not in self.lost]
        answers: list[Message | Fp8SyncError] = []
        while due and not (answers and isinstance(answers[-1], Fp8SyncError)):
            answers.append(heard(due.pop(0)))
        if due:
            with waiting(), ThreadPoolExecutor(len(due), "fp8sync-hear") as pool:
                answers += pool.map(heard, due)
        said = [each for each in answers if not isinstance(each, Fp8SyncError)]
        return said, [error for member, error in sorted(self.lost.items()) if member[0] == role]

    def votes(self, patience: int = 1) -> list[Fp8SyncError]:
        """Return the errors of workers that are lost, then those that workers report.

        Args:
            patience: timeouts until a vote, where a worker may have waited for another one before.
        """
        votes, faults = self.hear("engine", "vote", patience * self._timeout_s)
        for vote in votes:
            if vote["error"] is not None:
                error = from_wire(vote["error"])
                faults.append(error.named(f"{vote['peer']}: {error.summary}"))
        return faults

    def interrupt(self) -> None:
        """Hear no more of workers than they have said; a thread that waits for one wakes with `EngineLost`."""
        self.interrupted = True
        for channel in self.each("engine"):
            channel.deafen()

    def close(self) -> None:
        """Hang up; a thread that waits for a peer wakes with `EngineLost`."""
        for channel in self.all:
            channel.close()
