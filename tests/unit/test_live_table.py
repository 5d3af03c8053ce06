"""A table over live weights: made anew where they move, refused where its device cannot read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8sync.errors import Fp8SyncError
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan
from fp8sync.sending.live import LiveTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8sync.plan import Copy


def copies() -> tuple[Copy, ...]:
    info = TensorInfo("norm.weight", (64,), "bfloat16")
    box = Box(info.name, (0,), (64,), Placement("norm", 0, (1,)))
    side = Manifest.of([info], {0: [box]})
    return build_plan(side, side).copies


def test_made_anew_only_where_weights_have_moved() -> None:
    found: list[tuple[int, str]] = []

    def build(source: Callable[[str], tuple[int, str]]) -> Any:
        found.append(source("norm"))
        return len(found)

    table = LiveTable(copies(), build, torch.device("cpu"))
    first, second = (torch.ones(64, dtype=torch.bfloat16) for _ in range(2))
    assert [table.at({"norm": t, "unused": t}) for t in (first, first, second)] == [1, 1, 2]
    assert found == [(t.data_ptr(), "bfloat16") for t in (first, second)]


def test_weights_that_were_moved_to_the_host_are_refused() -> None:
    table = LiveTable(copies(), lambda _: pytest.fail("built"), torch.device("cuda", 0))
    text = "norm: expected weights that cuda:0 reads, as when the link was made, found them on cpu"
    with pytest.raises(Fp8SyncError, match=text):
        table.at({"norm": torch.ones(64, dtype=torch.bfloat16)})
