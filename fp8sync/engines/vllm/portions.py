"""Portions of a version: modules that are received, processed and installed before the next are received.

Staged commits have one. In place there are as many as it takes to keep staging memory small. What vLLM
has to load or process together is never taken apart: a module, modules that share a parameter, and all
that tensors of the misc path may go into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from fp8sync.engines.vllm.storage import MISC, module_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8sync.control import Message
    from fp8sync.engines.vllm.direct import DirectInstall
    from fp8sync.engines.vllm.install import ProcessInstall
    from fp8sync.engines.vllm.intake import Receiver
    from fp8sync.engines.vllm.storage import EngineLayout

__all__ = ["Installed", "Portion", "memory_short", "storages_by_portion"]


@dataclass
class Installed:
    """What links have made of a worker's weights; outlives them."""

    mixed: bool = False
    """Whether parts of two versions are live, or what was computed with another one."""
    stopped: str = ""
    """The link that has stopped the engine and has not said that it goes on."""

    def heed(self, message: Message) -> None:
        """Take a link's word that it stops the engine or that this goes on, and that weights and caches agree."""
        self.stopped = str(message["by"])
        if message["whole"]:
            self.mixed = False


@dataclass(frozen=True)
class Portion:
    """One worker's part in a portion.

    Args:
        layout: of its storages.
        receiver: takes its bytes.
        direct: installs those of its modules that need no processing.
        process: installs the others.
    """

    layout: EngineLayout
    receiver: Receiver
    direct: DirectInstall
    process: ProcessInstall


def storages_by_portion(layout: EngineLayout, nbytes: int) -> list[list[str]]:
    """Return the storages of each portion, in the layout's order.

    Args:
        layout: of all storages.
        nbytes: staging memory to fill; more only where one unit alone takes more.
    """
    units: dict[str, list[str]] = {}
    unit_of = _units(layout)
    for storage in layout.storages:
        units.setdefault(unit_of(storage), []).append(storage)
    portions: list[list[str]] = []
    room = 0
    for storages in units.values():
        size = sum(layout.storages[name].nbytes for name in storages)
        if size > room or not portions:
            portions.append([])
            room = nbytes
        portions[-1] += storages
        room -= size
    return portions


def _units(layout: EngineLayout) -> Callable[[str], str]:
    """Return what tells a storage's unit."""
    shared = {module_of(alias): module_of(name) for alias, name in layout.aliases.items()}
    misc = any(name.startswith(MISC) for name in layout.storages)
    loose = {module_of(name) for name in layout.open} | set(layout.processed if misc else ())
    loose |= {first for other, first in shared.items() if other in loose}

    def unit_of(storage: str) -> str:
        module = shared.get(module_of(storage), module_of(storage))
        return MISC if storage.startswith(MISC) or module in loose else module

    return unit_of


def memory_short(layout: EngineLayout, reserved: int, device: torch.device) -> str:
    """Return why staging all of a layout does not fit into memory; empty where it does.

    At most half of what is free is taken: vLLM's processing and its next forward need some, too.

    Args:
        layout: of all storages.
        reserved: bytes of staging memory that there are.
        device: the worker's.
    """
    needed = sum(spec.nbytes for spec in layout.storages.values())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    if needed <= reserved or needed <= (free + reserved) // 2:
        return ""
    return f"staging takes {needed / 1e9:.2f} GB, of which {reserved / 1e9:.2f} GB are reserved, and {free / 1e9:.2f} GB are free"
