"""An engine that stops to answer, and a link that another thread closes: reported soon, with the old weights serving."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import fp8sync
from tests.engines import serving, world

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from tests.engines.test_async import Engine

pytestmark = pytest.mark.usefixtures("one_thread")

TIMEOUT_S = 4.0


def core_of(engine: Engine) -> psutil.Process:
    (process,) = engine.llm.engine_core.resources.engine_manager.processes
    return psutil.Process(process.pid)


@pytest.mark.parametrize(
    ("call", "timeouts"), [("last_label", 3), ("start", 3), ("stop", 5), ("finish", 4)]
)
def test_a_frozen_engine_is_reported_soon(
    engine: Engine,
    models: list[torch.nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    timeouts: int,
) -> None:
    """A call has three timeouts. Once one was not answered, the others have one, and the next link tidies up."""
    recipe, core = world.recipe("blockwise-pow2"), core_of(engine)
    fp8sync.refit(models[0], engine.llm, recipe)
    before = engine.logprobs()
    with fp8sync.connect(models[1], engine.llm, recipe, timeout_s=TIMEOUT_S) as link:
        handle: Any = link._engine
        real: Callable[..., Any] = getattr(handle, call)

        began: list[float] = []

        def frozen(*args: Any, **options: Any) -> Any:
            core.suspend()
            began.append(time.monotonic())
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(handle, call, frozen)
            try:
                with pytest.raises(fp8sync.TransferTimeout):
                    link.refit()
            finally:
                ended = time.monotonic()
                core.resume()
        assert ended - began[0] < (timeouts + 0.8) * TIMEOUT_S
        assert (engine.logprobs() - before).abs().max().item() == 0.0
        assert link.refit().version == 1
        assert link.audit().equal
    assert (engine.logprobs() - before).abs().max().item() > 0.0


def test_a_link_that_is_closed_while_requests_end(
    engine: Engine, models: list[torch.nn.Module]
) -> None:
    recipe, prompt = world.recipe("blockwise-pow2"), serving.PROMPTS[0]
    fp8sync.refit(models[0], engine.llm, recipe)
    before = engine.logprobs()
    link = fp8sync.connect(models[1], engine.llm, recipe)
    raised: list[BaseException] = []

    def refit() -> None:
        with pytest.raises(fp8sync.Fp8SyncError, match="closed meanwhile") as caught:
            link.refit("wait")
        raised.append(caught.value)

    thread = threading.Thread(target=refit)
    with engine.slow():
        stream = engine.begun(prompt, 400)
        thread.start()
        while not engine.loop.run(engine.llm.is_paused()):
            assert thread.is_alive()
            time.sleep(0.01)
        link.close()
        thread.join(60)
    assert [type(error) for error in raised] == [fp8sync.Fp8SyncError]
    assert len(stream.result(60)[0]) == 400
    assert not engine.loop.run(engine.llm.is_paused())
    assert (engine.logprobs() - before).abs().max().item() == 0.0
    with pytest.raises(fp8sync.Fp8SyncError, match="was closed"):
        link.refit()
    with fp8sync.connect(models[1], engine.llm, recipe) as other:
        other.refit()
        assert other.audit().equal
