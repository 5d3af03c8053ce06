"""A rank that stands still where it would write: from then on others may write there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8sync.errors import Fp8SyncError, TransferTimeout
from fp8sync.sending.writer import Writer
from tests.layouts import test_links

if TYPE_CHECKING:
    from tests.layouts.test_links import Refit

refit = test_links.refit
AN_AGE = 1e4


def staged(refit: Refit) -> list[torch.Tensor]:
    return [t.clone() for worker in refit.workers for t in worker.staged.values()]


def test_a_rank_that_was_held_up_writes_no_more(
    refit: Refit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two parts, for longer than workers wait: it launches none of those that follow, and all hear why."""
    launched, launch = 0, Writer._launch

    def held_up(writer: Writer, *args: Any) -> None:
        nonlocal launched
        launch(writer, *args)
        if writer._rank == 1:
            launched += 1
            refit.follower._member.announced -= AN_AGE * (launched == 3)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_launch", held_up)
        first, *others = refit.run()
    assert launched == 3
    assert isinstance(first, TransferTimeout)
    assert "trainer rank 1 was held up, and writes no more" in str(first)
    assert type(others[0]) in (TransferTimeout, Fp8SyncError)
    assert others[1:] == [None, None]


def test_a_rank_that_comes_when_rank_0_has_left_writes_nothing(refit: Refit) -> None:
    """It was stopped before it read that there is a version."""
    for worker in refit.workers:
        for tensor in worker.staged.values():
            tensor.zero_()
    before = staged(refit)
    refit.leader.open(1)
    refit.leader.close()
    with pytest.raises(Fp8SyncError):
        refit.follower.transfer()
    assert all(map(torch.equal, staged(refit), before))
