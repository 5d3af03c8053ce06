"""What a worker finds in its staging memory after writers of this host, held to what they say they wrote."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8sync.engines.vllm.staging import Staging
from fp8sync.engines.vllm.storage import StorageSpec
from fp8sync.errors import CorruptBucket
from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.manifest import Manifest
from fp8sync.plan import build_plan
from fp8sync.sending.exchange import open_exchange
from fp8sync.sending.share import Share, Written
from fp8sync.sending.writer import PARTS, StagingPlace, Writer
from tests.layouts import wire
from tests.layouts.cases import QWEN

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a large model."""
    monkeypatch.setattr("fp8sync.sending.writer.LEAST_BYTES", 1)
    monkeypatch.setattr("fp8sync.sending.writer.STRIP_BYTES", 1 << 15)


class World:
    """Two trainer ranks that both write to the one worker, and the worker's memory."""

    def __init__(self) -> None:
        source = manifest(TrainerLayout(tp=2), QWEN)
        wanted = manifest(EngineLayout(), QWEN)
        plan = build_plan(source, wanted)
        (found,) = wire.storages(wanted, None).values()
        specs = {n: StorageSpec(tuple(t.shape), t.stride(), t.dtype) for n, t in found.items()}
        self.staging = Staging(CPU, 0)
        self.staging.lay_out([specs])
        place = StagingPlace(self.staging.export(), self.staging.offsets)
        self.expected = self.staging.expect(plan.to_rank(0), 0)
        held = wire.storages(source, wire.random_tensors(source))
        self.written = [self._write(rank, held[rank], plan, place) for rank in held]
        self.expected.begin()

    def _write(self, rank: int, held: Any, plan: Any, place: StagingPlace) -> list[bytes]:
        def no_team(_: tuple[int, ...]) -> Any:
            raise AssertionError("no block is cut here")

        exchange = open_exchange(plan.amax, rank, CPU, no_team)
        live: Any = SimpleNamespace(storages=lambda: held)
        told: list[Written] = []
        share = Share(live, rank, Manifest({}), plan, 20.0, exchange)
        assert Writer(share, {0: place}).send(1, told.append).error is None
        return [part[0] for part in told]

    def verify(self) -> None:
        for digests in zip(*self.written, strict=True):
            self.expected.verify(digests)
        self.expected.end()


def test_what_was_written_is_verified_and_again_in_the_next_version() -> None:
    world = World()
    assert [len(told) for told in world.written] == [PARTS, PARTS]
    world.verify()
    world.expected.begin()
    world.verify()


def test_a_small_share_is_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8sync.sending.writer.LEAST_BYTES", 1 << 29)
    world = World()
    for told in world.written:
        assert len(told) == PARTS
        assert [n for n, part in enumerate(told) if part] == [PARTS - 1]
    world.verify()


def test_a_flipped_byte_is_named() -> None:
    world = World()
    name = next(n for n in world.staging.offsets if n.endswith("o_proj.weight"))
    world.staging._arena[world.staging.offsets[name] + 5] ^= 1
    with pytest.raises(CorruptBucket, match=r"o_proj.weight: engine rank 0 expected digest 0x"):
        world.verify()


@pytest.mark.parametrize("change", ["fewer", "more"])
def test_a_rank_that_tells_of_another_number_of_copies_is_named(change: str) -> None:
    world = World()
    told = world.written[1]
    last = max(n for n, part in enumerate(told) if part)
    told[last] = told[last][:-8] if change == "fewer" else told[last] + bytes(8)
    with pytest.raises(CorruptBucket, match=r"expected \d+ digests from trainer rank 1, found \d+"):
        world.verify()
