"""fp8sync: a trainer's new weights in a live vLLM, as blockwise FP8, after every optimizer step.

report = fp8sync.refit(model, engine, recipe="blockwise")
"""

from fp8sync.api import close, refit, restore_kv_scales
from fp8sync.calibrate import calibrate_kv
from fp8sync.errors import (
    CorruptBucket,
    EngineLost,
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
