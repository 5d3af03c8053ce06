"""Which tests may be skipped, and why: allowed_skips.txt, and the hardware a test asks for."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class AllowedSkip:
    """One line of the list: a pattern of test ids and a pattern of reasons, as in a shell."""

    test: str
    reason: str


def parse(text: str) -> list[AllowedSkip]:
    allowed = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        test, separator, reason = (part.strip() for part in line.partition(" | "))
        if not (test and separator and reason):
            message = (
                f"allowed_skips.txt:{number}: expected 'TEST PATTERN | REASON', found {line!r}"
            )
            raise ValueError(message)
        allowed.append(AllowedSkip(test, reason))
    return allowed


def is_allowed(allowed: list[AllowedSkip], nodeid: str, reason: str) -> bool:
    return any(
        fnmatchcase(nodeid, entry.test) and fnmatchcase(reason, entry.reason) for entry in allowed
    )


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The words given to skip(), without pytest's prefix."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ").strip()


def missing_hardware(item: pytest.Item) -> str | None:
    """Why this machine cannot run the test, or None when it can."""
    if marker := item.get_closest_marker("multigpu"):
        needed = marker.args[0] if marker.args else 2
    else:
        needed = 1 if item.get_closest_marker("gpu") else 0
    if needed and (found := cuda_devices()) < needed:
        return f"needs {needed} CUDA device(s), found {found}"
    if item.get_closest_marker("amx") and not has_amx():
        return "needs AMX tiles, which this processor lacks"
    return None


@cache
def cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@cache
def has_amx() -> bool:
    """Whether vLLM's FP8 kernels for the processor run here."""
    import torch

    return torch.cpu._is_amx_tile_supported()
