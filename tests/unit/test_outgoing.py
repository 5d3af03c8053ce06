"""Which transport is taken, and what is said of it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.plan import build_plan
from fp8sync.sending.outgoing import choose_transport
from fp8sync.transport.memory import host_id
from fp8sync.transport.seat import Seat
from tests.layouts.cases import PAIRS

MODEL = PAIRS["tp2-tp2"].model
PLAN = build_plan(manifest(TrainerLayout(tp=2), MODEL), manifest(EngineLayout(tp=2), MODEL))
CUT = "NCCL takes one rank per GPU, and 2 share a"


def seats(*gpus: str, host: str = host_id()) -> list[Seat]:
    return [Seat(host, gpu, host) for gpu in gpus]


def places(*gpus: str, host: str = host_id()) -> dict[int, dict[str, Any]]:
    return {
        n: {"gpu": gpu, "memory": {"host": host} if gpu else None} for n, gpu in enumerate(gpus)
    }


@pytest.mark.parametrize(
    ("trainer", "engine", "kind", "why"),
    [
        (seats("a", "b"), places("c", "d"), "ipc", "share a host"),
        (seats("a", "b"), places("a", "b"), "ipc", "share a host"),
        (
            seats("a", "b"),
            places("c", "d", host="far"),
            "nccl",
            "on different hosts; every rank has",
        ),
        (seats("a", "b"), places("a", "c", host="far"), "gloo", f"on different hosts; {CUT}"),
        (seats("", ""), places("c", "d"), "gloo", "the trainer's weights are not on a GPU"),
        (seats("a", "b"), places("", ""), "gloo", "the engine's staging memory is not on a GPU"),
    ],
)
def test_auto_goes_by_where_everyone_is(trainer: Any, engine: Any, kind: str, why: str) -> None:
    found, reason = choose_transport("auto", PLAN, trainer, engine)
    assert found == kind
    assert why in reason


@pytest.mark.parametrize("wanted", ["ipc", "nccl", "gloo", "golden"])
def test_what_is_asked_for_is_taken_where_it_is_possible(wanted: str) -> None:
    together = seats("a", "b"), places("c", "d")
    assert choose_transport(wanted, PLAN, *together) == (wanted, "asked for")


def test_an_engine_that_keeps_no_scales_is_not_written_one_sided() -> None:
    plan = build_plan(
        manifest(TrainerLayout(tp=2), MODEL), manifest(EngineLayout(tp=2, scales=False), MODEL)
    )
    why = r"the engine keeps no scales of model.layers.0.\S+, and no launch dequantizes"
    with pytest.raises(ValueError, match=f"'ipc' is not possible: {why}"):
        choose_transport("ipc", plan, seats("a", "b"), places("c", "d"))
    found, reason = choose_transport("auto", plan, seats("a", "b"), places("c", "d"))
    assert found == "nccl"
    assert re.match(f"{why}; every rank has a GPU of its own", reason)


def test_what_is_not_possible_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=f"'nccl' is not possible: {CUT}"):
        choose_transport("nccl", PLAN, seats("a", "b"), places("a", "c"))
    with pytest.raises(ValueError, match=r"'ipc' is not possible: .* different hosts"):
        choose_transport("ipc", PLAN, seats("a", "b"), places("c", "d", host="far"))
    with pytest.raises(ValueError, match="unknown transport 'rdma'; known: auto, ipc, nccl"):
        choose_transport("rdma", PLAN, seats("a", "b"), places("c", "d"))
