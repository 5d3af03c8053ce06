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


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize(
    ("layers", "shapes"),
    [
        # Qwen3-Next-80B-A3B: gated delta networks; Nemotron-3-Nano-30B-A3B: Mamba layers.
        (36, {"in_proj_qkvz": [12288, 2048], "in_proj_ba": [64, 2048], "conv1d": [8192, 1, 4]}),
        (23, {"in_proj": [10304, 2688], "conv1d": [6144, 1, 4]}),
    ],
    ids=["qwen3-next", "nemotron-3-nano"],
)
def test_no_ranks_memory_stands_out_at_full_size(
    ranks: int, layers: int, shapes: dict[str, list[int]]
) -> None:
    """By 0.2 GiB at most, of what is gathered and kept until it is sent."""
    rows = [
        [f"layers.{n}.{name}", shape, "bfloat16", "no boxes"]
        for n in range(layers)
        for name, shape in shapes.items()
    ]
    owned = divide([rows] * ranks)
    kept = [2 * sum(o.info.numel for o in owned.values() if o.rank == r) for r in range(ranks)]
    assert sum(kept) > 1 << 30
    assert max(kept) - min(kept) <= 0.2 * (1 << 30)


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
