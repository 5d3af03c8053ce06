"""A table over live weights: made anew where they move, refused where its device cannot read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8sync.errors import Fp8SyncError, TensorMismatch
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


@pytest.mark.parametrize("found", [torch.ones(128)[::2], torch.ones(65), torch.ones(63)])
def test_weights_that_moved_must_lie_as_they_did(found: torch.Tensor) -> None:
    """An embedding with more rows, or a transposed weight: the same places hold something else."""
    table = LiveTable(copies(), lambda _: "table", torch.device("cpu"))
    table.at({"norm": torch.ones(64)})
    with pytest.raises(TensorMismatch) as refusal:
        table.at({"norm": found})
    shape, strides = tuple(found.shape), found.stride()
    assert refusal.value.violations == (
        f"norm: expected (64,) with strides (1,), found {shape} with strides {strides}",
    )
    assert table.at({"norm": torch.zeros(64)}) == "table"
