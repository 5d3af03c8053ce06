"""Who fails after joining a group, or after mapping memory, leaves none of it behind for the next attempt."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed

from fp8sync.engines.vllm.golden import GoldenReceiver
from fp8sync.engines.vllm.grouped import GroupReceiver
from fp8sync.engines.vllm.intake import Intake
from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.plan import Plan, build_plan, order_of
from fp8sync.sending.exchange import open_exchange
from fp8sync.sending.golden import GoldenSender
from fp8sync.sending.grouped import GroupSender
from fp8sync.sending.share import Share
from fp8sync.sending.writer import Writer
from fp8sync.transport import GlooGroup
from fp8sync.transport.memory import MappedMemory, allocate, export_memory
from fp8sync.transport.nccl import NcclGroup
from tests.layouts import wire
from tests.layouts.cases import PAIRS, RAGGED_MOE
from tests.layouts.test_draining import fail_once

if TYPE_CHECKING:
    from collections.abc import Callable

dist: Any = torch.distributed
CPU = torch.device("cpu")
BUCKET_BYTES = 1 << 20
CASE = PAIRS["moe-ep2-ep2"]
SIDES = manifest(CASE.trainer, CASE.model), manifest(CASE.engine, CASE.model)
PLAN = build_plan(*SIDES)


def close(held: Any) -> None:
    """Once, and again without a word, as portions share a group."""
    if held in held.open:
        held.open.remove(held)


class Joined(GlooGroup):
    """A group of one member, in `open` until it is closed; stands where a GPU would have a communicator."""

    open: list[Any]

    def __init__(self, *_: Any) -> None:
        super().__init__(dist.HashStore(), 0, 1, "127.0.0.1", 5.0)
        self.open.append(self)

    def close(self) -> None:
        close(self)


class Mapped(MappedMemory):
    """Memory of this process, in `open` until it is closed."""

    open: list[Any]

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.open.append(self)

    def close(self) -> None:
        close(self)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is open."""
    found: list[Any] = []
    for kind in (Joined, Mapped):
        monkeypatch.setattr(kind, "open", found, raising=False)
    monkeypatch.setattr(NcclGroup, "join", Joined)
    monkeypatch.setattr("fp8sync.sending.writer.MappedMemory", Mapped)
    return found


def intakes(count: int) -> list[Intake]:
    """Of as many portions, each of which is everything."""
    channel: Any = SimpleNamespace(timeout_s=5.0)
    return [Intake(channel, Any, *SIDES, PLAN, 0, CPU)] * count


def shares(count: int) -> list[Share]:
    held = wire.storages(SIDES[0], None)[0]
    source: Any = SimpleNamespace(storages=lambda: held)
    return [Share(source, 0, SIDES[0], PLAN, 5.0, nobody(PLAN))] * count


def nobody(plan: Plan) -> Any:
    return open_exchange(plan.amax, 0, CPU, Joined)


def invitation(portions: int) -> dict[str, Any]:
    sizes = {"bucket_bytes": BUCKET_BYTES, "forward_bytes": 0}
    orders = [order_of(PLAN, [0, 1], BUCKET_BYTES)] * portions
    return {"carrier": "nccl", "members": [[0, 2], [1, 3]], **sizes, "orders": orders}


def written(portions: int) -> dict[str, Any]:
    """The invitation to write to both workers."""
    del portions
    places = []
    for rank, held in wire.storages(SIDES[1], None).items():
        offsets, size = {}, 0
        for name, tensor in held.items():
            offsets[name] = size
            size += -(-tensor.nbytes // 256) * 256
        memory = asdict(export_memory(allocate(size, CPU)))
        places.append([rank, {"memory": memory, "offsets": offsets, "gpu": ""}])
    return {"places": places}


WAYS: dict[str, tuple[Callable[..., Any], Callable[[int], Any], Callable[[int], Any], int]] = {
    "grouped, worker": (GroupReceiver.open, invitation, intakes, 2),
    "grouped, trainer": (GroupSender.open, invitation, shares, 2),
    "golden, worker": (GoldenReceiver.open, invitation, intakes, 1),
    "golden, trainer": (GoldenSender.open, invitation, shares, 1),
    "written": (Writer.open, written, shares, 2),
}
WORKER, TRAINER = "fp8sync.engines.vllm.", "fp8sync.sending."


@pytest.mark.parametrize(
    ("way", "target", "call"),
    [
        ("grouped, worker", WORKER + "grouped.make_buffers", 0),
        ("grouped, worker", WORKER + "grouped.Relay", 1),
        ("grouped, trainer", TRAINER + "grouped.make_buffers", 0),
        ("grouped, trainer", TRAINER + "grouped.Stamp", 1),
        ("golden, worker", WORKER + "golden.pieces_of", 0),
        ("golden, trainer", TRAINER + "golden.pieces_of", 0),
        ("written", TRAINER + "writer.MappedMemory", 1),
        ("written", TRAINER + "writer.LiveTable", 0),
        ("written", TRAINER + "writer.compile_ahead", 0),
        ("written", TRAINER + "writer.MappedMemory", 3),
    ],
)
def test_a_way_that_fails_while_it_opens(
    way: str, target: str, call: int, left: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At `call`, counted from 0, of `target`; once more it opens, and what it holds is free when it is closed."""
    opens, invited, wanted, portions = WAYS[way]
    with monkeypatch.context() as patch:
        fail_once(patch, target, call)
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            opens(invited(portions), wanted(portions))
    assert left == []
    ways = opens(invited(portions), wanted(portions))
    assert len(ways) == portions
    assert left
    for each in ways:
        each.close()
    assert left == []


def test_a_team_whose_exchange_has_no_memory(
    left: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = TrainerLayout(dp=4, fsdp=4), EngineLayout(scales=False)
    plan = build_plan(*(manifest(each, RAGGED_MOE) for each in layouts), exchange_amax=True)
    with monkeypatch.context() as patch:
        fail_once(patch, TRAINER + "exchange.AmaxExchange", 0)
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            nobody(plan)
    assert left == []
    exchange = nobody(plan)
    assert len(left) == 1
    exchange.close()
    assert left == []
