"""Trainer rank 0's channels to everyone else: engine workers, and the trainer's other ranks.

Every wait is bounded by the link's timeout; every error names the peer.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from fp8sync.control import framed
from fp8sync.errors import EngineLost, Fp8SyncError, TransferTimeout, from_wire
from fp8sync.waiting import waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8sync.control import Channel, Listener, Message

__all__ = ["Peers"]

_AT_ONCE = 16
"""Peers that a message goes to at the same time; a thread each, and only while a link is made."""


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
        self.left_open = False
        """Whether an engine's update was left open by a trainer that is gone."""
        self.left_mixed = False
        """Whether a worker holds parts of two versions, be it of other links."""
        self.stoppers = [""] * len(engines)
        """Of each engine, a link that has stopped it and has not said that it goes on."""

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
            TransferTimeout: somebody does not come.
        """
        for number in range(len(self._expected)):
            channel = listener.accept(f"peer {number + 1} of {len(self._expected)}")
            joined = channel.receive("join")
            role, rank = str(joined["role"]), int(joined["rank"])
            channel.peer = f"{role} rank {rank}"
            if (role, rank) not in self._expected or (role, rank) in self.channels:
                raise Fp8SyncError(f"{channel.peer} joined twice, or is not expected here")
            if role == "engine":
                several = self._engine_of[-1] > 0
                channel.peer += f" of engine {self._engine_of[rank]}" if several else ""
                self.left_open |= bool(joined["updating"])
                self.left_mixed |= bool(joined["mixed"])
                number = self._engine_of[rank]
                self.stoppers[number] = self.stoppers[number] or str(joined["stopped"])
            self.channels[role, rank] = channel

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

    def say_stopped(self, link: str, stay: Sequence[bool]) -> None:
        """Tell workers which link stops their engine, or "" once it goes on.

        Args:
            link: its name.
            stay: of each engine, whether it was stopped by somebody else; empty for none.
        """
        for rank, channel in enumerate(self.each("engine")):
            if not (stay and stay[self._engine_of[rank]]):
                channel.try_send({"type": "stopped", "by": link})

    def hear(
        self, role: str, kind: str, timeout_s: float | None = None
    ) -> tuple[list[Message], list[Fp8SyncError]]:
        """Take a message of everyone who can be heard; who cannot is hung up on.

        Returns:
            What was said, and why each of the others was hung up on, be it now or before.
        """
        said: list[Message] = []
        lost: list[Fp8SyncError] = []
        for member, channel in sorted(self.channels.items()):
            if member[0] != role:
                continue
            try:
                if member not in self.lost:
                    said.append({"peer": channel.peer, **channel.receive(kind, timeout_s)})
            except Fp8SyncError as error:
                channel.close()
                self.lost[member] = error
            if member in self.lost:
                lost.append(self.lost[member])
        return said, lost

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

    def close(self) -> None:
        """Hang up; a thread that waits for a peer wakes with `EngineLost`."""
        for channel in self.all:
            channel.close()
