"""A rank that stands still while it writes: from then on others may write where it would."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fp8sync.errors import Fp8SyncError, TransferTimeout
from fp8sync.sending.writer import PARTS
from fp8sync_kernels import run_table
from tests.layouts.test_links import refit  # noqa: F401  (a fixture)

if TYPE_CHECKING:
    import pytest

    from tests.layouts.test_links import Refit


def test_a_rank_that_was_held_up_writes_no_more(
    refit: Refit,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two parts, for longer than workers wait: of what follows not a byte is written, and all hear why."""
    late_s, launched = 0.0, 0
    now = time.perf_counter

    def launch(*args: Any) -> None:
        nonlocal late_s, launched
        run_table(*args)
        launched += 1
        late_s += 1e4 * (launched == 3)

    for worker in refit.workers:
        for tensor in worker.staged.values():
            tensor.zero_()
    with monkeypatch.context() as patch:
        patch.setattr("fp8sync.sending.writer.run_table", launch)
        patch.setattr("fp8sync.sending.writer.time.perf_counter", lambda: now() + late_s)
        first, *others = refit.run()
    assert isinstance(first, TransferTimeout)
    assert "was held up while it wrote: expected less than" in str(first)
    assert type(others[0]) in (TransferTimeout, Fp8SyncError)
    assert others[1:] == [None, None]
    assert launched < 2 * PARTS
    assert not refit.arrived()
