"""Agreeing on cut blocks when a rank of the team fails, is late, or stays away."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed

from fp8sync.errors import Fp8SyncError, PeerFailed, TensorMismatch, TransferTimeout
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan
from fp8sync.recipe import Encoding, Formula
from fp8sync.sending.exchange import AmaxExchange, open_exchange
from fp8sync.transport import GlooGroup

if TYPE_CHECKING:
    from collections.abc import Callable

dist: Any = torch.distributed
TIMEOUT_S = 20.0
RANKS = range(3)


def exchanges(limit_s: float = TIMEOUT_S) -> list[AmaxExchange]:
    """128 rows on three ranks: 50, 50 and 28."""
    at = Placement("w", 0, (128, 1))
    boxes = {r: [Box("w", (50 * r, 0), (50 if r < 2 else 28, 128), at)] for r in RANKS}
    source = Manifest.of([TensorInfo("w", (128, 128), "bfloat16")], boxes)
    wanted = TensorInfo("w", (128, 128), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
    whole = Box("w", (0, 0), (128, 128), at, Placement("s", 0, (1, 1)))
    plan = build_plan(source, Manifest.of([wanted], {0: [whole]}), exchange_amax=True)
    store = dist.HashStore()

    def join(ranks: tuple[int, ...], rank: int) -> GlooGroup:
        names = {n: f"trainer rank {r}" for n, r in enumerate(ranks)}
        return GlooGroup(store, rank, len(ranks), "127.0.0.1", limit_s, names)

    with ThreadPoolExecutor(len(RANKS)) as pool:
        cpu = torch.device("cpu")
        made = [
            pool.submit(open_exchange, plan.amax, r, cpu, lambda ranks, r=r: join(ranks, r))
            for r in RANKS
        ]
        return [future.result() for future in made]


def weights(rank: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((50, 128), 1.0 + rank, dtype=torch.bfloat16)}


def fail() -> dict[str, torch.Tensor]:
    raise RuntimeError("offloaded")


def together(
    team: list[AmaxExchange], reads: list[Callable[[], dict[str, torch.Tensor]]]
) -> list[BaseException | None]:
    with ThreadPoolExecutor(len(team)) as pool:
        done = [pool.submit(e.agree, read) for e, read in zip(team, reads, strict=True)]
        return [future.exception() for future in done]


def test_a_rank_that_fails_is_named_and_the_next_exchange_works() -> None:
    team = exchanges()
    reads = [lambda r=r: weights(r) for r in RANKS]
    began = time.monotonic()
    errors = together(team, [reads[0], fail, reads[2]])
    assert time.monotonic() - began < TIMEOUT_S / 2
    assert isinstance(errors[1], RuntimeError)
    for rank in (0, 2):
        assert isinstance(errors[rank], PeerFailed)
        assert str(errors[rank]) == "trainer rank 1 failed before amax was exchanged"
    assert together(team, reads) == [None] * len(RANKS)
    for exchange in team:
        ((_, joint),) = exchange.amax["w"]
        assert joint.tolist() == [[3.0]]


def test_weights_that_lie_otherwise_are_not_measured() -> None:
    """A shorter tensor would be read past its end; here its neighbours in memory would be the maximum."""
    team = exchanges()
    reads = [lambda r=r: weights(r) for r in RANKS]
    assert together(team, reads) == [None] * len(RANKS)
    short = torch.full((50, 128), 7.0, dtype=torch.bfloat16)[:10]
    began = time.monotonic()
    errors = together(team, [reads[0], lambda: {"w": short}, reads[2]])
    assert time.monotonic() - began < TIMEOUT_S / 2
    assert isinstance(errors[1], TensorMismatch)
    found = "found bfloat16 (10, 128) with strides (128, 1)"
    assert errors[1].violations == (
        f"w: expected bfloat16 (50, 128) with strides (128, 1), {found}",
    )
    for rank in (0, 2):
        assert str(errors[rank]) == "trainer rank 1 failed before amax was exchanged"
    assert together(team, reads) == [None] * len(RANKS)


def test_weights_that_have_not_changed_are_not_checked_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    team = exchanges()
    held = [weights(r) for r in RANKS]
    checked: list[int] = []
    for exchange in team:
        check = exchange.alike.check
        monkeypatch.setattr(
            exchange.alike, "check", lambda *at, check=check: (checked.append(1), check(*at))
        )
    reads = [lambda r=r: held[r] for r in RANKS]
    for _ in range(3):
        assert together(team, reads) == [None] * len(RANKS)
    assert len(checked) == len(RANKS)
    whole = held[1]["w"]
    held[1]["w"] = whole.as_strided((50, 128), (0, 1))  # at the same address
    assert isinstance(together(team, reads)[1], TensorMismatch)
    held[1]["w"] = whole
    assert together(team, reads) == [None] * len(RANKS)
    assert len(checked) == len(RANKS) + 2


def test_another_default_dtype_changes_nothing() -> None:
    """A trainer may have set it, and a vLLM in this process sets it while it loads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        team = exchanges()
    finally:
        torch.set_default_dtype(before)
    assert together(team, [lambda r=r: weights(r) for r in RANKS]) == [None] * len(RANKS)
    for exchange in team:
        ((_, joint),) = exchange.amax["w"]
        assert joint.dtype == torch.float32
        assert joint.tolist() == [[3.0]]


def test_a_rank_that_stays_away_is_waited_for_no_longer_than_agreed() -> None:
    limit_s = 2.0
    team = exchanges(limit_s)
    began = time.monotonic()
    errors = together(team[:2], [lambda r=r: weights(r) for r in RANKS[:2]])
    assert time.monotonic() - began < 3 * limit_s
    for error in errors:
        assert isinstance(error, Fp8SyncError)
    late = next(error for error in errors if isinstance(error, TransferTimeout))
    assert "one of trainer rank 0, trainer rank 1, trainer rank 2 did not join" in str(late)


def test_a_member_that_never_comes() -> None:
    with pytest.raises(TransferTimeout, match="group of 3 was not complete"):
        GlooGroup(dist.HashStore(), 0, 3, "127.0.0.1", 0.5)
