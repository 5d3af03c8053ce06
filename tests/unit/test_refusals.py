"""What a refit that fails says first."""

from __future__ import annotations

import pytest

from fp8sync.errors import (
    EngineLost,
    Fp8SyncError,
    InstallFailed,
    NonFiniteWeight,
    PeerFailed,
    TransferTimeout,
)
from fp8sync.link.faults import with_refusals

WAITED, LOST = TransferTimeout("worker 0 took no bucket"), EngineLost("trainer rank 1 is gone")
MEMORY, FOLLOWED = InstallFailed("worker 0: no memory"), PeerFailed("worker 1: rank 0 gave up")
SILENT, BAD = TransferTimeout("worker 1 sent no vote"), NonFiniteWeight("NaN in w")


@pytest.mark.parametrize(
    ("faults", "refused", "expected"),
    [
        ([], [], []),
        ([], [MEMORY, FOLLOWED], [MEMORY, FOLLOWED]),
        ([BAD], [FOLLOWED, MEMORY], [BAD]),
        ([LOST], [SILENT], [LOST, SILENT]),
        ([WAITED], [FOLLOWED, SILENT], [WAITED]),
        ([WAITED], [FOLLOWED, MEMORY, SILENT], [MEMORY, WAITED]),
        ([WAITED, BAD], [MEMORY], [WAITED, BAD]),
        ([BAD], [FOLLOWED, SILENT], [BAD, SILENT]),
    ],
)
def test_who_is_heard(
    faults: list[Fp8SyncError], refused: list[Fp8SyncError], expected: list[Fp8SyncError]
) -> None:
    assert with_refusals(faults, refused) == expected
