"""How the members of a link meet: one control message, made by trainer rank 0.

It is the same for everyone but for the number that each member has. Whatever meets at a rendezvous
(`gloo`, for one) numbers the trainer's ranks first and the engine's workers behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8sync.transport.nccl import new_unique_id
from fp8sync.transport.rendezvous import Rendezvous, is_loopback

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8sync.plan import Run, Stamps

__all__ = ["Choice", "Invitation"]

Choice = dict[str, Any]
"""The control message `transport` (docs/wire-format.md): its kind, and what a member needs to join."""


class Invitation:
    """What every member is told of the transport; keeps open where they meet.

    Args:
        kind: the transport's name.
        host: address that a rendezvous binds.
        timeout_s: how long a member waits for another.
        peers: name of every other member, by (role, rank).
        places: what each worker said of its staging memory, and of its portions, by engine rank.
        sizes: payloads in bytes: `bucket_bytes` of a message from a trainer rank, `forward_bytes` of one
            from worker to worker, 0 where nothing is forwarded.
        carrier: `nccl` or `gloo`: what carries the messages of `golden`.
        orders: of messages by `nccl`, for each portion (`plan.order_of`).
        stamps: of each trainer rank's messages, for each portion (`plan.stamps_of`).
    """

    def __init__(
        self,
        kind: str,
        host: str,
        timeout_s: float,
        peers: Mapping[tuple[str, int], str],
        places: Mapping[int, Mapping[str, Any]],
        sizes: Mapping[str, int],
        carrier: str,
        orders: Sequence[Sequence[Run]] = (),
        stamps: Sequence[Mapping[int, Sequence[Stamps]]] = (),
    ) -> None:
        names = {("trainer", 0): "trainer rank 0", **peers}
        order = sorted(names, key=lambda member: (member[0] != "trainer", member[1]))
        self._numbers = {member: number for number, member in enumerate(order)}
        workers = [[rank, n] for (role, rank), n in self._numbers.items() if role == "engine"]
        self._common: Choice = {
            "type": "transport",
            "kind": kind,
            **sizes,
            "members": workers,
            "names": [names[member] for member in order],
            "portions": [[rank, place["portions"]] for rank, place in places.items()],
        }
        self._stamps = stamps
        self._places = [list(item) for item in places.items()]
        self._rendezvous: Rendezvous | None = None
        carrier = carrier if kind == "golden" else kind
        self._common["carrier"] = carrier
        if carrier == "gloo":
            self._rendezvous = Rendezvous(host, timeout_s)
            self._common |= {"host": self._rendezvous.host, "port": self._rendezvous.port}
        if carrier == "nccl":
            # Members that reached us at a loopback address are on this host.
            loopback = is_loopback(host)
            unique_id = new_unique_id(loopback=loopback)
            self._common |= {"unique_id": unique_id, "loopback": loopback}
        if orders:
            self._common["orders"] = orders

    def to(self, role: str, rank: int) -> Choice:
        """Return the message for one member."""
        own = {**self._common, "rank": self._numbers[role, rank]}
        if role == "trainer":
            own["stamps"] = [portion.get(rank, []) for portion in self._stamps]
        return {**own, "places": self._places} if own["kind"] == "ipc" else own
