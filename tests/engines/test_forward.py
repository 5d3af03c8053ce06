"""Two live engines on one node are fed once, and their workers hand on to one another."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from fp8sync.transport.seat import NODE_VARIABLE
from tests.engines import world

if TYPE_CHECKING:
    from pathlib import Path

BUCKET_BYTES = 1 << 15
"""Small, so that there are many: what a message costs is part of the forecast."""


def start(folder: Path) -> Any:
    return world.start_engine(folder, load_format="dummy", multiprocess=True)


def connect(model: Any, engines: Any) -> Any:
    recipe = world.recipe("blockwise-pow2")
    return fp8sync.connect(
        model, engines, recipe, transport="gloo", bucket_bytes=BUCKET_BYTES, timeout_s=30.0
    )


def process_of(llm: Any) -> int:
    (process, *_) = llm.llm_engine.engine_core.resources.engine_manager.processes
    return process.pid


def bytes_wanted(link: Any) -> int:
    return sum(c.weight_bytes + c.scale_bytes for c in link.plan.plan.copies)


def test_two_engines_of_one_node_are_fed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = world.tiny_model("dense", 1)
    config = world.write_config(model, tmp_path / "config")
    engines = [start(config) for _ in range(2)]

    # Directly, one by one: what both are to say later.
    with connect(model, engines[0]) as alone:
        assert "no two engine ranks of a node want the same" in alone.transport
        alone.refit()
    expected = world.logprobs(engines[0])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)

    link = connect(model, engines)
    assert "each node being fed once" in link.transport
    assert "link engine 0 -> 1: " in link.plan.explain()
    for _ in range(2):
        report = link.refit()
    assert report.seconds["forward"] > 0.0
    assert bytes_wanted(link) / 2 <= report.bytes_sent < 0.6 * bytes_wanted(link)
    forwarded = [world.logprobs(llm) for llm in engines]
    assert torch.equal(forwarded[0], forwarded[1])
    assert not torch.equal(forwarded[0], expected)
    with connect(model, engines[0]) as alone:
        alone.refit()
    assert torch.equal(world.logprobs(engines[0]), forwarded[0])

    # The forwarder of half of it dies when everything is there and handing on begins.
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    link.refit()  # joins anew: the other link had engine 0
    before = world.logprobs(engines[0])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    conductor = link._conductor
    spread = conductor._peers.spread

    def kill(role: str, message: dict[str, Any]) -> None:
        if message["type"] == "forward":
            os.kill(process_of(engines[1]), signal.SIGKILL)
        spread(role, message)

    monkeypatch.setattr(conductor._peers, "spread", kill)
    began = time.monotonic()
    with pytest.raises(fp8sync.EngineLost, match=r"engine rank 1.* is gone|engine 1 of the list"):
        link.refit()
    assert time.monotonic() - began < 60.0
    assert torch.equal(world.logprobs(engines[0]), before)
    link.close()

    # In its place comes one on another node, as far as it is told: nothing is forwarded to it.
    world.stop_engine(engines[1])
    monkeypatch.setenv(NODE_VARIABLE, "another")
    engines[1] = start(config)
    monkeypatch.delenv(NODE_VARIABLE)
    with connect(model, engines) as link:
        assert "no two engine ranks of a node want the same" in link.transport
        assert link.refit().bytes_sent >= bytes_wanted(link)
    after = [world.logprobs(llm) for llm in engines]
    assert torch.equal(after[0], after[1])
    assert not torch.equal(after[0], before)
    for llm in engines:
        world.stop_engine(llm)
