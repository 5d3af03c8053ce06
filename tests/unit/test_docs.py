"""The reference names everything that is public."""

from __future__ import annotations

from pathlib import Path

import fp8sync

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    listed = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith(":::")}
    errors = {n for n in fp8sync.__all__ if getattr(fp8sync, n).__module__ == "fp8sync.errors"}
    assert set(fp8sync.__all__) - errors <= listed
    assert "::: fp8sync.errors" in page
