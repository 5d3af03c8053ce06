"""What one rank, of either side, holds of a plan: digests of its units, and rows to look at."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from fp8sync.audit.units import Held, Unit, Unreadable, rows_of
from fp8sync_kernels import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from fp8sync.control import Channel

__all__ = ["Ledger"]


class Ledger:
    """What one rank holds of its units.

    Args:
        units: of this rank.
        read: returns a unit as it is held; raises `Unreadable`.
        before: `scales` of the ledger of the audit before this one.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        read: Callable[[Unit], Held],
        before: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._units = {unit.key: unit for unit in units}
        self._read, self._before = read, before or {}
        self.scales: dict[str, torch.Tensor] = {}

    def digests(self) -> dict[str, list[int] | str]:
        """Return digests by unit, or why there are none; of a trainer rank, `scales` is filled."""
        found: dict[str, list[int] | str] = {}
        for key, unit in self._units.items():
            try:
                held = self._read(unit)
            except Unreadable as error:
                found[key] = str(error)
                continue
            found[key] = held.digests()
            if held.made_of is not None:
                self.scales[key] = held.made_of[1].cpu()
        return found

    def look(self, key: str, kind: str, row: int | None) -> Any:
        """Look closer at a unit.

        Args:
            key: of the unit.
            kind: `weight` or `scale_inv`; of a trainer rank also `codes` and `scales`.
            row: of the unit.

        Returns:
            The bytes of one row in base64; without a row, the digest of every row. For `scales`,
            scale_inv of every block touched, now and at the audit before (None if there was none).
        """
        if kind == "scales":
            before = self._before.get(key)
            return [self.scales[key].tolist(), None if before is None else before.tolist()]
        held = self._read(self._units[key])
        if kind == "codes" and held.made_of is not None:
            rows = rows_of(held.made_of[0])
        else:
            rows = rows_of(getattr(held, kind))
        if row is None:
            return [digest(each) for each in rows]
        return base64.b64encode(rows[row].cpu().numpy().tobytes()).decode()

    def answer(self, channel: Channel) -> None:
        """Tell the digests to whoever audits, and then what it asks to look at."""
        channel.send({"type": "held", "digests": self.digests()})
        while (question := channel.receive("look"))["unit"] is not None:
            seen = self.look(question["unit"], question["kind"], question["row"])
            channel.send({"type": "seen", "seen": seen})
