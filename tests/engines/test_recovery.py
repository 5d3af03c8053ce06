"""A worker or a trainer rank that fails while bytes arrive: named at once, and the very next refit works."""

from __future__ import annotations

import json
import time
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from tests.engines import world
from tests.engines.sabotage import SABOTAGE
from tests.engines.test_processes import torchrun

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TIMEOUT_S = 6.0
UNPACKING = {
    "gloo": ("fp8sync.engines.vllm.buckets", "unpack"),
    "golden": ("fp8sync.engines.vllm.golden", "view"),
}
PACKING = {"gloo": "fp8sync.sending.sender.pack", "golden": "fp8sync.sending.golden.view"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = world.tiny_model("dense", 1)
    folder = world.write_config(model, tmp_path_factory.mktemp("engine"))
    llm = world.start_engine(folder, load_format="dummy", **SABOTAGE)
    yield llm
    del llm
    world.forget_engines()


@pytest.fixture(params=UNPACKING)
def link(engine: Any, request: pytest.FixtureRequest) -> Iterator[fp8sync.Link]:
    """A link whose engine serves version 1; small buckets, so that there are many."""
    model = world.tiny_model("dense", 2)
    about: Any = {"timeout_s": TIMEOUT_S, "bucket_bytes": 1 << 18, "transport": request.param}
    with fp8sync.connect(model, engine, world.recipe("blockwise"), **about) as link:
        link.refit()
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        yield link


@pytest.mark.usefixtures("untouched")
def test_worker_without_memory(engine: Any, link: Any) -> None:
    """The rest is taken off the wire, so that the trainer need not wait and the link is kept."""
    step = UNPACKING[link.transport.partition(":")[0]]
    engine.collective_rpc("fail_to_unpack", args=step)
    conductor, began = link._conductor, time.monotonic()
    with pytest.raises(fp8sync.Fp8SyncError, match=r"engine rank 0.*no memory left"):
        link.refit()
    assert time.monotonic() - began < TIMEOUT_S / 2
    assert link._conductor is conductor


@pytest.mark.usefixtures("untouched")
def test_trainer_without_memory(link: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends what is left as void: workers do not wait either."""
    function = PACKING[link.transport.partition(":")[0]]
    pack, calls = resolve_name(function), iter(range(100))

    def fail(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no memory left")
        return pack(*arguments)

    conductor, began = link._conductor, time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(function, fail)
        with pytest.raises(fp8sync.Fp8SyncError, match=r"trainer rank 0 failed.*no memory left"):
            link.refit()
    assert time.monotonic() - began < TIMEOUT_S / 2
    assert link._conductor is conductor


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("link", ["gloo"], indirect=True)
def test_worker_that_takes_nothing(engine: Any, link: Any) -> None:
    """Its reason is what is said first, but the trainer has waited in vain: the link is made anew."""
    engine.collective_rpc("fail_to_receive")
    with pytest.raises(
        fp8sync.Fp8SyncError, match=r"engine rank 0.*nothing can be taken"
    ) as raised:
        link.refit()
    assert type(raised.value) is fp8sync.Fp8SyncError
    assert "did not take a bucket within 6 s" in str(raised.value)
    assert link._conductor is None


def test_trainer_of_two_ranks(tmp_path: Path) -> None:
    """Both hear what was wrong with the worker, and the very next refit of both works."""
    torchrun("tests.engines.recovery_ranks", 2, str(tmp_path))
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    for rank in ranks:
        unpacked, received = rank["failed"]
        assert "no memory left" in unpacked["error"]
        assert unpacked["seconds"] < rank["timeout_s"] / 2
        assert "nothing can be taken" in received["error"]
        assert [each["kind"] for each in rank["failed"]] == ["Fp8SyncError"] * 2
        assert [each["next"] for each in rank["failed"]] == [2, 3]
    assert [each["kept"] for each in ranks[0]["failed"]] == [0.0, 0.0]
    assert all(each["moved"] > 0.0 for each in ranks[0]["failed"])
    assert ranks[0]["difference"] == 0.0
