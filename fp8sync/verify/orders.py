"""What a trainer and an engine's host tell each other, through files in a folder that both see.

`order.json` is the trainer's: what to serve. `host.json` is the host's: where, and how that went. Each is
replaced as a whole; `number` says which order an answer is to.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from fp8sync.errors import EngineLost, TransferTimeout

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Message", "Orders", "read", "write"]

Message = dict[str, Any]
_HOST_S = 120.0
"""Until a host says that it is there."""
_START_S = 1800.0
"""Until an engine serves: large models take their time, and a failure is told at once."""
_POLL_S = 0.2


def write(folder: Path, name: str, message: Message) -> None:
    """Replace one side's file."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f".{name}"
    whole.write_text(json.dumps(message), encoding="utf-8")
    whole.replace(folder / name)


def read(folder: Path, name: str) -> Message:
    """Return what one side said last, or that its number is 0."""
    try:
        found: Message = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"number": 0}
    return found


class Orders:
    """The trainer's side.

    Args:
        folder: shared with the host.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = int(read(folder, "order.json")["number"])

    def serve(self, settings: Message) -> str:
        """Let the host serve this, and return the address.

        Args:
            settings: options of `vllm serve`, by their Python names.

        Raises:
            EngineLost: the server ended; says why.
            TransferTimeout: the host does not answer.
        """
        answer = self._say(settings, _START_S)
        if "failed" in answer:
            raise EngineLost(answer["failed"])
        return str(answer["url"])

    def stop(self) -> None:
        """Let the host end what it serves."""
        self._say(None, _HOST_S)

    def about_host(self) -> Message:
        """Wait for the host; return `where`, `fp8` (whether its vLLM can hold it) and `versions`."""
        return self._wait(0, _HOST_S)

    def _say(self, settings: Message | None, limit_s: float) -> Message:
        self._number += 1
        write(self._folder, "order.json", {"number": self._number, "settings": settings})
        return self._wait(self._number, limit_s)

    def _wait(self, number: int, limit_s: float) -> Message:
        ends = time.monotonic() + limit_s
        while time.monotonic() < ends:
            answer = read(self._folder, "host.json")
            if "where" in answer and answer["number"] >= number:
                return answer
            time.sleep(_POLL_S)
        raise TransferTimeout(f"no engine host answered in {self._folder} within {limit_s:g} s")
