"""A table over live weights: made anew where they move, refused where its device cannot read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8sync.errors import Fp8SyncError, TensorMismatch
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan
from fp8sync.sending.alike import Alike
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

    table = LiveTable(copies(), build, torch.device("cpu"), Alike(0))
    first, second = (torch.ones(64, dtype=torch.bfloat16) for _ in range(2))
    assert [table.at({"norm": t, "unused": t}) for t in (first, first, second)] == [1, 1, 2]
    assert found == [(t.data_ptr(), "bfloat16") for t in (first, second)]


def test_weights_that_were_moved_to_the_host_are_refused() -> None:
    table = LiveTable(copies(), lambda _: pytest.fail("built"), torch.device("cuda", 0), Alike(0))
    text = "norm: expected weights that cuda:0 reads, as when the link was made, found them on cpu"
    with pytest.raises(Fp8SyncError, match=text):
        table.at({"norm": torch.ones(64, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    "found", [torch.ones(128)[::2], torch.ones(65), torch.ones(63), torch.ones(64).half()]
)
def test_weights_that_moved_must_lie_as_they_did(found: torch.Tensor) -> None:
    """An embedding with more rows, or a transposed weight: the same places hold something else."""
    table = LiveTable(copies(), lambda _: "table", torch.device("cpu"), Alike(3))
    table.at({"norm": torch.ones(64)})
    with pytest.raises(TensorMismatch) as refusal:
        table.at({"norm": found})
    dtype, shape = str(found.dtype).removeprefix("torch."), tuple(found.shape)
    assert refusal.value.summary.startswith("weights of trainer rank 3 lie otherwise")
    told = f"found {dtype} {shape} with strides {found.stride()}"
    assert refusal.value.violations == (f"norm: expected float32 (64,) with strides (1,), {told}",)
    assert table.at({"norm": torch.zeros(64)}) == "table"


@pytest.mark.parametrize(
    "changed",
    [
        lambda x: x.view(16, 4),
        lambda x: x.view(2, 4, 8),
        lambda x: x.t(),
        lambda x: x[:4],
        lambda x: x.view(torch.bfloat16),
        lambda x: x.as_strided((8, 8), (0, 1)),
        lambda x: x.as_strided((4, 16), (8, 1)),
    ],
)
def test_weights_that_lie_otherwise_at_the_same_address_are_refused(
    changed: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    table = LiveTable(copies(), lambda _: "table", torch.device("cpu"), Alike(0))
    norm = torch.ones(8, 8, dtype=torch.float16)
    table.at({"norm": norm})
    with pytest.raises(TensorMismatch):
        table.at({"norm": changed(norm)})
    strided = norm.t()
    table = LiveTable(copies(), lambda _: "table", torch.device("cpu"), Alike(0))
    assert [table.at({"norm": x}) for x in (strided, norm.t())] == ["table"] * 2
    with pytest.raises(TensorMismatch):
        table.at({"norm": norm})


def test_freed_weights_are_refused_all_at_once() -> None:
    """Their table would be of address 0; at connecting, too, and not those that have no elements."""
    names = ["a", "b", "none"]
    held = {"a": torch.ones(64), "b": torch.ones(64), "none": torch.ones(0)}
    views = {**held, "b": held["b"][8:]}
    alike = Alike(3)
    alike.check(views, names)
    for name in names:
        held[name].untyped_storage().resize_(0)
    for one in (alike, Alike(3)):
        with pytest.raises(TensorMismatch) as refusal:
            one.check(views, names)
        assert refusal.value.summary.startswith("weights of trainer rank 3 hold no data")
        told = "expected data, found freed memory"
        assert refusal.value.violations == (f"a: {told}", f"b: {told}")


def test_a_single_row_lies_alike_whatever_its_stride() -> None:
    """Of a weight such as a shared expert's gate, [1, hidden], torch may say either."""
    alike, row = Alike(0), torch.ones(1, 64)
    alike.check({"gate": row}, ["gate"])
    alike.check({"gate": row.as_strided((1, 64), (1, 1))}, ["gate"])
    with pytest.raises(TensorMismatch):
        alike.check({"gate": torch.ones(1, 128)[:, ::2]}, ["gate"])
