"""The parts in which a share is written: all of it in order, the first and the last of them small."""

from __future__ import annotations

from itertools import chain

import pytest

from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.layouts.presets import PRESETS
from fp8sync.plan import Copy, build_plan, in_parts
from fp8sync.sending.writer import LEAST_BYTES, PARTS, _sizes, as_written


def nbytes(*copies: Copy) -> int:
    return sum(copy.weight_bytes + copy.scale_bytes for copy in copies)


@pytest.mark.parametrize("sizes", [[1], [0, 0, 1], [1, 3, 9, 3, 1], [0, 5, 0, 5, 0]])
def test_parts_are_the_run_divided_as_asked_for(sizes: list[int]) -> None:
    model = PRESETS["llama-3.1-8b"]
    plan = build_plan(manifest(TrainerLayout(), model), manifest(EngineLayout(), model))
    copies = list(as_written(plan.copies))
    parts = in_parts(copies, sizes)
    assert list(chain(*parts)) == copies
    for part, size in zip(parts, sizes, strict=True):
        share = nbytes(*copies) * size / sum(sizes)
        assert abs(nbytes(*part) - share) <= max(nbytes(copy) for copy in copies)
        assert bool(part) is bool(size)


@pytest.mark.parametrize(
    ("trainer", "engine", "empty"),
    [
        (TrainerLayout(tp=2), EngineLayout(tp=2), 0),
        (TrainerLayout(dp=3, fsdp=3), EngineLayout(), 2),
    ],
)
def test_a_vocabulary_does_not_make_the_last_part_large(
    trainer: TrainerLayout, engine: EngineLayout, empty: int
) -> None:
    """While workers verify the last part, nothing arrives; `lm_head`, which comes last, is 12 % of a share."""
    model = PRESETS["llama-3.1-8b"]
    plan = build_plan(manifest(trainer, model), manifest(engine, model), exchange_amax=True)
    copies = [copy for copy in as_written(plan.copies) if copy.source_rank == 1]
    sizes = _sizes(nbytes(*copies))
    parts = in_parts(copies, sizes)
    assert [len(part) for part in parts[:empty]] == [0] * empty
    for part in (parts[empty], parts[PARTS - 1]):
        assert 0 < nbytes(*part) < 1.3 * nbytes(*copies) / sum(sizes)


def test_small_shares_go_in_fewer_parts() -> None:
    assert _sizes(53 * LEAST_BYTES) == [1, 3, 9, 27, 9, 3, 1]
    assert _sizes(53 * LEAST_BYTES - 1) == [0, 0, 1, 3, 9, 3, 1]
    assert _sizes(5 * LEAST_BYTES) == [0, 0, 0, 0, 1, 3, 1]
    assert _sizes(0) == [0, 0, 0, 0, 0, 0, 1]
