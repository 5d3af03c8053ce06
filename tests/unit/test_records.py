"""Parts of tensors in a directory of torch.distributed.checkpoint, mapped where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fp8sync.errors import UnsupportedLayout
from fp8sync.sources import as_source
from fp8sync.sources.megatron.records import Records

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8),  # what follows it is not aligned
    "matrix": torch.randn(6, 4).to(torch.bfloat16),
    "turned": torch.randn(5, 3).t(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "nothing.to.map": "text",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(TENSORS, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_they_are_what_was_saved(folder: Path) -> None:
    records = Records(folder)
    assert records.shapes == {n: t.shape for n, t in TENSORS.items() if isinstance(t, torch.Tensor)}
    for name in records.shapes:
        ((start, tensor),) = records.parts(name)
        assert start == (0,) * tensor.dim()
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_nothing_is_written_back(folder: Path) -> None:
    ((_, tensor),) = Records(folder).parts("matrix")
    tensor.zero_()
    ((_, again),) = Records(folder).parts("matrix")
    assert torch.equal(again, TENSORS["matrix"])


def test_a_file_that_is_missing_or_cut_short_is_named(folder: Path) -> None:
    (file,) = folder.glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    records = Records(folder)
    with pytest.raises(UnsupportedLayout, match=r"(turned|matrix|odd|scalar|empty) at"):
        _ = [list(records.parts(name)) for name in records.shapes]
    file.unlink()
    with pytest.raises(UnsupportedLayout, match=r"odd at \[0\]: .*No such file"):
        list(Records(folder).parts("odd"))
    (folder / ".metadata").write_bytes(b"no index")
    with pytest.raises(UnsupportedLayout, match=r"\.metadata cannot be read"):
        Records(folder)


def test_without_a_bridge_it_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedLayout, match="expected the bridge= that knows its mappings"):
        as_source(folder)
