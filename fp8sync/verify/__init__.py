"""Proof for users: audit, divergence and a fresh load, against limits. `fp8sync verify` runs it."""

from __future__ import annotations

from fp8sync.verify.agreement import Agreement, compare
from fp8sync.verify.limits import LIMITS, REGRESSION, Limit, exceeded, limit_of

__all__ = ["LIMITS", "REGRESSION", "Agreement", "Limit", "compare", "exceeded", "limit_of"]
