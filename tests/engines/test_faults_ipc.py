"""Trainers that fail while they write into the memory of a live engine: nothing of it is ever served."""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from fp8sync.manifest import ITEMSIZE
from fp8sync.sending.writer import Writer
from fp8sync.transport import memory
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Launch = Callable[..., None]

pytestmark = pytest.mark.gpu

TIMEOUT_S = 4.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = world.write_config(world.tiny_model("moe", 1), tmp_path_factory.mktemp("engine"))
    llm = world.start_engine(folder, load_format="dummy")
    yield llm
    del llm
    world.forget_engines()


@pytest.fixture
def link(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[fp8sync.Link]:
    """A link by `ipc` whose engine serves version 1. From another GPU its share goes in several parts, else in one."""
    monkeypatch.setattr("fp8sync.sending.writer.LEAST_BYTES", 1 << 12)
    model = world.tiny_model("moe", 2).to(f"cuda:{torch.cuda.device_count() - 1}")
    recipe = world.recipe("blockwise")
    link = fp8sync.connect(model, engine, recipe, transport="ipc", timeout_s=TIMEOUT_S)
    link.refit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    yield link
    link.close()


def after(number: int, change: Callable[[Writer, Any], None]) -> Launch:
    """A launch that has something done once the bytes of a part, of those that have some, are where they belong."""
    launch, count = Writer._launch, iter(range(100))

    def changed(writer: Writer, part: Any, *rest: Any) -> None:
        launch(writer, part, *rest)
        if part.seen.numel() and next(count) == number:
            torch.cuda.synchronize(writer._device)
            change(writer, part)

    return changed


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.multigpu(2)) for n in (1, 3))]
)
def test_a_byte_that_changes(link: fp8sync.Link, part: int, monkeypatch: Any) -> None:
    """In the engine's memory, after it was written and before the worker looks."""

    def overwrite(writer: Any, written: Any) -> None:
        copy = writer._cut[written.seen.storage_offset()]
        start = writer._locate(copy.destination_rank, copy.at.storage)
        start += copy.at.offset * ITEMSIZE[copy.dtype]
        with torch.cuda.device(writer._device):
            assert memory._runtime().cudaMemset(ctypes.c_void_p(start), 0x5A, 4) == 0
            torch.cuda.synchronize()

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_launch", after(part, overwrite))
        with pytest.raises(fp8sync.CorruptBucket, match="engine rank 0 expected digest"):
            link.refit()


@pytest.mark.usefixtures("untouched")
def test_a_trainer_that_falls_silent(link: fp8sync.Link, monkeypatch: Any) -> None:
    """Before anyone hears of a part: the engine gives up by itself, and takes the next link."""
    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_launch", after(0, lambda *_: time.sleep(3 * TIMEOUT_S)))
        # Of several parts, those that follow are not written, and the trainer says why; else the worker does.
        parts = torch.cuda.device_count() > 1
        text = (
            "trainer rank 0 was held up" if parts else r"trainer at .* sent no 'written' within 8 s"
        )
        with pytest.raises(fp8sync.TransferTimeout, match=text):
            link.refit()
    assert time.monotonic() - began < 6 * TIMEOUT_S


@pytest.mark.usefixtures("untouched")
def test_a_launch_that_fails(link: fp8sync.Link, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_launch", after(0, fail))
        text = "trainer rank 0 failed: RuntimeError: no memory left"
        with pytest.raises(fp8sync.Fp8SyncError, match=text):
            link.refit()


@pytest.mark.usefixtures("untouched")
def test_a_weight_that_is_not_finite(engine: Any) -> None:
    """Counted as it is written, in another link's version."""
    model = world.tiny_model("moe", 3)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5, 100, 100] = torch.nan
    name = r"layers\.1\.mlp\.experts\.5\.down_proj\.weight \(trainer rank 0\)"
    with (
        fp8sync.connect(model, engine, world.recipe("blockwise"), transport="ipc") as link,
        pytest.raises(fp8sync.NonFiniteWeight, match=f"{name}: expected finite values, found 1"),
    ):
        link.refit()
