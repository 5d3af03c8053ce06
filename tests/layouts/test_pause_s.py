"""What `report.pause_s` is: the time for which an engine was stopped, or that its workers stood."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8sync.engines.vllm.fleet import _first
from tests.layouts import test_failed_calls

if TYPE_CHECKING:
    from tests.layouts.test_failed_calls import Pair

pair = test_failed_calls.pair
LONG_S = 1e4


def pause_s(pair: Pair, mode: str, since: float | None) -> float:
    """Of a refit of an engine that says that it stands since then."""
    pair.engine.pause = lambda *_, **__: since  # type: ignore[method-assign]
    leads, follows = pair.links
    following = pair._pool.submit(follows.refit)
    report: Any = leads.refit(mode)
    following.result(test_failed_calls.WAIT_S)
    return float(report.pause_s)


def test_of_engines_that_are_stopped_and_that_are_not(pair: Pair) -> None:
    assert pair.connect() == [None, None]
    pair.engine.of_two[0].stood_s, pair.engine.of_two[1].stood_s = 3.0, 7.0
    now = time.perf_counter()
    assert pause_s(pair, "keep", None) == 7.0  # as the slowest worker says
    # Requests that end (`wait`) are no part of it: it counts from where nothing is stepped; else from the call.
    assert LONG_S < pause_s(pair, "wait", now - LONG_S) < LONG_S + test_failed_calls.WAIT_S
    assert 0.0 < pause_s(pair, "keep", now - LONG_S) < test_failed_calls.WAIT_S


def test_several_engines_stand_from_the_first_on() -> None:
    assert _first([None, 5.0, 3.0]) == 3.0
    assert _first([None, None]) is None


def test_a_worker_on_the_processor_measures_by_the_clock() -> None:
    standstill = pytest.importorskip("fp8sync.engines.vllm.standstill").Standstill
    stood = standstill(torch.device("cpu"))
    time.sleep(0.02)
    stood.installed()
    time.sleep(0.02)
    assert 0.02 <= stood.seconds() == stood.seconds()


@pytest.mark.gpu
def test_a_worker_does_not_count_the_step_under_way() -> None:
    """Nor what comes after; what is enqueued to install it does."""
    standstill = pytest.importorskip("fp8sync.engines.vllm.standstill").Standstill
    device, cycles = torch.device("cuda", torch.cuda.current_device()), 40_000_000  # some 20 ms
    alone = standstill(device)
    torch.cuda._sleep(cycles)
    alone.installed()
    took = alone.seconds()
    torch.cuda._sleep(5 * cycles)
    stood = standstill(device)
    torch.cuda._sleep(cycles)
    stood.installed()
    torch.cuda._sleep(5 * cycles)
    assert 0.5 * took < stood.seconds() < 2 * took
