"""What goes wrong while a link is made, between its real members, each in a thread of this process."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed

from fp8sync.cli import main
from fp8sync.control import Channel
from fp8sync.errors import EngineLost, Fp8SyncError, PlanMismatch, UnsupportedLayout
from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.link import member
from fp8sync.manifest import Manifest
from fp8sync.plan import Plan, Planner
from scripts.bench import refit_world
from tests.layouts.cases import QWEN

if TYPE_CHECKING:
    from pathlib import Path

    from fp8sync.control import Message
    from fp8sync.link.conductor import Conductor

dist: Any = torch.distributed
CPU = torch.device("cpu")
WAIT_S = 20.0


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for longer."""
    monkeypatch.setattr(refit_world, "TIMEOUT_S", WAIT_S / 2)


def connect(source: Manifest, wanted: Manifest) -> list[BaseException | None]:
    """Make a link of two trainer ranks and two workers; what ranks 0 and 1 and the workers raised."""
    store = dist.HashStore()
    held = [refit_world.allocated(source, rank, CPU) for rank in (0, 1)]
    sources = [
        refit_world.PaperSource(refit_world.own(source, rank), held[rank]) for rank in (0, 1)
    ]
    workers = [
        refit_world.Worker(refit_world.own(wanted, rank), rank, CPU) for rank in wanted.ranks
    ]
    raised: BaseException | None = None
    with ThreadPoolExecutor(1 + len(workers)) as pool:
        others = [pool.submit(refit_world.follow, sources[1], 1, store, "link")]
        others += [pool.submit(worker.join, store, "link") for worker in workers]
        try:
            counts = 2, len(workers)
            refit_world.lead(sources[0], store, "link", "gloo", counts, 1 << 15).close()
        except Fp8SyncError as error:
            raised = error
        return [raised, *(each.exception(WAIT_S) for each in others)]


def _another_place(plan: Plan) -> Plan:
    """One element further in the worker's storage."""
    copies = [*plan.copies]
    i = next(i for i, copy in enumerate(copies) if "k_proj" in copy.tensor)
    copies[i] = replace(copies[i], at=copies[i].at.at([0] * (len(copies[i].shape) - 1) + [1]))
    return replace(plan, copies=tuple(copies))


def _another_order(plan: Plan) -> Plan:
    assert len(plan.amax) > 1
    return replace(plan, amax=plan.amax[::-1])


TWO_HALVES = TrainerLayout(tp=2), EngineLayout(tp=2), QWEN
CUT = TrainerLayout(dp=2, fsdp=2), EngineLayout(engines=2), replace(QWEN, hidden=320)


@pytest.mark.parametrize(
    ("rank", "layouts", "change", "text"),
    [
        (1, TWO_HALVES, _another_place, r"k_proj\.weight: first .* \(to engine rank 1\)"),
        (1, CUT, _another_order, r"\.weight: first .* \(amax of cut blocks\)"),
        (0, CUT, _another_order, r"\.weight: first .* \(amax of cut blocks\)"),
    ],
)
def test_trainer_ranks_with_different_plans(
    rank: int, layouts: Any, change: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of different releases: everyone hears of the first tensor, whichever rank is the odd one."""
    trainer, engine, model = layouts

    class Odd(Planner):
        def plan(self, *args: Any) -> Plan:
            return change(super().plan(*args))

    learn = member.Member.learn

    def learned(self: member.Member, *args: Any) -> None:
        learn(self, *args)
        if self.rank == rank:
            self._planner = Odd(args[0], exchange_amax=True)

    monkeypatch.setattr(member.Member, "learn", learned)
    for error in connect(manifest(trainer, model), manifest(engine, model)):
        assert isinstance(error, PlanMismatch)
        assert str(error).startswith("trainer rank 1 computed another plan than trainer rank 0")
        assert re.search(text + r"; expected \w+, found \w+", str(error))


def test_other_ranks_than_0_plan_what_they_send_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[int, Plan] = {}
    make_plan = member.Member.make_plan

    def kept(self: member.Member, wanted: Manifest) -> Plan:
        made[self.rank] = make_plan(self, wanted)
        return made[self.rank]

    monkeypatch.setattr(member.Member, "make_plan", kept)
    sides = manifest(TrainerLayout(tp=2), QWEN), manifest(EngineLayout(), QWEN)
    assert connect(*sides) == [None] * 3
    assert {copy.source_rank for copy in made[0].copies} == {0, 1}
    assert made[1] == made[0].sent_by(1) != made[0]


def test_a_layout_that_cannot_be_joined_is_refused_alike_on_every_rank() -> None:
    """Also on a rank that sends nothing of what is missing."""
    sides = manifest(TrainerLayout(tp=2), QWEN), manifest(EngineLayout(tp=2), QWEN)
    boxes = [box for box in sides[0].ranks[0] if "down_proj" not in box.tensor]
    held = Manifest(sides[0].tensors, {**sides[0].ranks, 0: tuple(boxes)})
    first, second, *_ = connect(held, sides[1])
    assert isinstance(first, UnsupportedLayout)
    assert "down_proj" in str(first)
    assert (type(second), str(second)) == (type(first), str(first))


def test_a_link_shows_both_manifests_as_fp8sync_plan_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {
        "trainer": manifest(TrainerLayout(tp=2), QWEN),
        "engine": manifest(EngineLayout(tp=2), QWEN),
    }
    lead, found = refit_world.lead, []

    def led(*args: Any) -> Conductor:
        found.append(lead(*args))
        return found[0]

    monkeypatch.setattr(refit_world, "lead", led)
    assert connect(*sides.values()) == [None] * 4
    assert found[0].manifests == sides
    arguments = ["plan", "--json"]
    for side, listed in found[0].manifests.items():
        path = tmp_path / f"{side}.json"
        path.write_text(json.dumps(listed.to_json()))
        arguments += [f"--{side}", str(path)]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["copies"] == len(found[0].plan.copies)


STAGES = ["join", "manifest", "plan", "place", "ready"]
DEATHS = [(1, stage) for stage in STAGES if stage != "place"] + [(3, stage) for stage in STAGES]


@pytest.mark.parametrize(("member", "stage"), DEATHS)
def test_a_peer_that_dies(member: int, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer rank 1, or worker 1, in the place of a message: all who wait hear of it at once, and whose."""
    name = {1: "trainer rank 1", 3: "engine rank 1"}[member]
    send = Channel.send
    role, _, rank = name.split()
    dying = threading.local()

    def sent(self: Channel, message: Message, *data: Any) -> None:
        if message["type"] == "join":
            dying.here = (message["role"], message["rank"]) == (role, int(rank))
        if message["type"] == stage and getattr(dying, "here", False):
            self.close()
            raise SystemExit
        send(self, message, *data)

    sides = manifest(TrainerLayout(tp=2), QWEN), manifest(EngineLayout(tp=2), QWEN)
    with monkeypatch.context() as patch:
        patch.setattr(Channel, "send", sent)
        raised = connect(*sides)
    assert isinstance(raised.pop(member), SystemExit)
    first, *others = raised
    assert isinstance(first, EngineLost)
    who = r"peer \d of 3" if stage == "join" else name
    assert re.match(who + rf" (closed the connection; expected '{stage}'|is gone)", str(first))
    for error in others:
        if stage == "ready":
            assert error is None  # they have nothing to wait for until the next version
        else:
            assert isinstance(error, EngineLost)
            assert stage == "join" or str(error) == str(first)
    assert connect(*sides) == [None] * 4
