"""Who keeps what of the tensors that a trainer has to gather."""

from __future__ import annotations

import pytest

from fp8sync.errors import UnsupportedLayout
from fp8sync.sources.megatron.gathered import divide

SIZES = [512, 3, 500, 40, 41, 42, 300, 299, 1]


def row(name: str, size: int, dtype: str = "bfloat16") -> list[object]:
    return [name, [size, 4], dtype, "no boxes"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_no_rank_keeps_much_more_than_another(ranks: int) -> None:
    rows = [row(str(n), size) for n, size in enumerate(SIZES)]
    owned = divide([rows] * ranks)
    assert set(owned) == {str(n) for n in range(len(SIZES))}
    kept = [sum(o.info.numel for o in owned.values() if o.rank == r) for r in range(ranks)]
    assert max(kept) - min(kept) <= 4 * max(SIZES)
    assert {o.info.misc for o in owned.values()} == {"no boxes"}


def test_a_tensor_stays_with_a_rank_that_is_given_it() -> None:
    found = [[row("a", 9)], [row("a", 9), row("b", 2)], [row("b", 2), row("c", 1)]]
    assert {n: o.rank for n, o in divide(found).items()} == {"a": 0, "b": 1, "c": 2}


def test_ranks_that_are_given_different_tensors_are_refused() -> None:
    found = [[row("a", 9), row("b", 2, "complex64")], [row("a", 8), row("b", 2, "complex64")]]
    with pytest.raises(UnsupportedLayout) as refused:
        divide(found)
    assert refused.value.violations == (
        "a: trainer rank 0 is given bfloat16 [9, 4], trainer rank 1 bfloat16 [8, 4]",
        "b: dtype complex64 cannot travel",
    )
