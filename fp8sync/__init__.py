"""fp8sync: a trainer's new weights in a live vLLM, as blockwise FP8, after every optimizer step.

report = fp8sync.refit(model, engine, recipe="blockwise")

Names are imported when they are first used: `fp8sync plan` and `fp8sync doctor` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8sync.api import close, refit, restore_kv_scales
    from fp8sync.calibrate import calibrate_kv
    from fp8sync.errors import (
        CorruptBucket,
        EngineLost,
        EngineUnusable,
        Fp8SyncError,
        InstallFailed,
        NonFiniteWeight,
        PeerFailed,
        PlanMismatch,
        RecipeMismatch,
        RefitInProgress,
        TensorMismatch,
        TransferTimeout,
        UnsupportedLayout,
    )
    from fp8sync.link import Link, connect
    from fp8sync.recipe import Recipe
    from fp8sync.report import RefitReport, TensorReport

__all__ = [
    "CorruptBucket",
    "EngineLost",
    "EngineUnusable",
    "Fp8SyncError",
    "InstallFailed",
    "Link",
    "NonFiniteWeight",
    "PeerFailed",
    "PlanMismatch",
    "Recipe",
    "RecipeMismatch",
    "RefitInProgress",
    "RefitReport",
    "TensorMismatch",
    "TensorReport",
    "TransferTimeout",
    "UnsupportedLayout",
    "calibrate_kv",
    "close",
    "connect",
    "refit",
    "restore_kv_scales",
]

_ROOMS = {
    "api": ("close", "refit", "restore_kv_scales"),
    "calibrate": ("calibrate_kv",),
    "link": ("Link", "connect"),
    "recipe": ("Recipe",),
    "report": ("RefitReport", "TensorReport"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fp8sync' has no attribute {name!r}")
    return getattr(import_module(f"fp8sync.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
