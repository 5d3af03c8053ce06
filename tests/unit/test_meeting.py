"""Ranks that are about to tell each other what they hold wait for one another, and name who does not come."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fp8sync import trainers
from fp8sync.errors import TransferTimeout

WAIT_S = 20.0


def test_all_come_time_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it stays in the store but who has come how often, and the last time."""
    store = dist.HashStore()
    monkeypatch.setattr(trainers, "_get_default_store", lambda: store)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(4):
            calls = [pool.submit(trainers._meet, rank, 3, WAIT_S) for rank in range(3)]
            assert [call.result(WAIT_S) for call in calls] == [None] * 3
    assert store.num_keys() == 3 + 3


def test_who_does_not_come_is_named_and_may_come_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(trainers, "_get_default_store", lambda: store)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(trainers._meet, rank, 4, 0.5) for rank in (0, 2)]
        for call in calls:
            with pytest.raises(
                TransferTimeout, match=r"trainer ranks .*1, .*3 did not come .* 0\.5 s"
            ):
                call.result(WAIT_S)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            calls = [pool.submit(trainers._meet, rank, 4, WAIT_S) for rank in range(4)]
            assert [call.result(WAIT_S) for call in calls] == [None] * 4
