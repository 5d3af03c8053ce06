"""What a link says of itself: its plan, both sides' manifests, how bytes travel and are installed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from fp8sync.plan import LinkPlan

if TYPE_CHECKING:
    from fp8sync.link.conductor import Conductor
    from fp8sync.manifest import Manifest

__all__ = ["Described"]


class Described(ABC):
    """A link as trainer rank 0 sees it."""

    @abstractmethod
    def _connected(self) -> Conductor:
        """Return who leads it.

        Raises:
            EngineLost: the link is down.
            Fp8SyncError: it was closed.
        """

    @property
    def plan(self) -> LinkPlan:
        """The plan that both sides agreed on."""
        return LinkPlan(self._connected().plan)

    @property
    def manifests(self) -> dict[str, Manifest]:
        """What all ranks of the `trainer` hold and all workers of the `engine` want, as data (`to_json`).

        Examples:
            >>> for side, manifest in link.manifests.items():  # doctest: +SKIP
            ...     Path(f"{side}.json").write_text(json.dumps(manifest.to_json()))
        """
        return self._connected().manifests

    @property
    def connect_s(self) -> dict[str, float]:
        """Seconds that connecting took, by stage, as trainer rank 0 saw it.

        `join` (everyone came), `gather` (trainer ranks said what they hold, and workers heard it), `learn`
        (this rank indexed it and compiled kernels, while workers traced), `trace` (workers said what they
        want), `plan`, `open` (this rank's way out; workers prove meanwhile which modules are `direct`),
        `ready` (everyone else is).
        """
        return dict(self._connected().connecting.seconds)

    @property
    def transport(self) -> str:
        """How the bytes travel, and why."""
        conductor = self._connected()
        return f"{conductor.transport}: {conductor.transport_reason}"

    @property
    def commit(self) -> str:
        """How versions are installed, in how many portions, and why."""
        conductor = self._connected()
        portions = f" in {conductor.portions} portions" if conductor.portions > 1 else ""
        return f"{conductor.commit_kind}{portions}: {conductor.commit_reason}"

    @property
    def strategies(self) -> str:
        """How many modules each worker overwrites with staged bytes (`direct`), and how many vLLM processes.

        And what was raised where `direct` could not be tried, out of memory for instance.
        """
        return self._connected().strategies
