"""An AsyncLLM and a server over HTTP in one refit: both install a version, or neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import fp8sync
from tests.engines import serving, world
from tests.engines.test_async import Engine
from tests.engines.test_server import Served

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")


def test_both_get_one_version_or_none(tmp_path: Path) -> None:
    models = serving.models()
    config = world.write_config(models[0], tmp_path / "config")
    recipe = world.recipe("blockwise-pow2")
    served = Served(config)
    engine = Engine(config)
    try:
        engines = [engine.llm, served.url]
        link = fp8sync.connect(models[0], engines, recipe, timeout_s=60.0)
        copies = link.plan.plan.copies
        assert {copy.destination_rank for copy in copies} == {0, 1}
        assert link.refit().version == 1
        first = engine.logprobs()
        assert (served.logprobs() - first).abs().max().item() == 0.0
        assert link.audit().equal

        with torch.no_grad():
            kept = models[0].lm_head.weight.clone()
            models[0].lm_head.weight[3, 3] = torch.nan
        with pytest.raises(fp8sync.NonFiniteWeight, match="lm_head"):
            link.refit()
        assert torch.equal(engine.logprobs(), first)
        assert (served.logprobs() - first).abs().max().item() == 0.0

        with torch.no_grad():
            models[0].lm_head.weight.copy_(kept * 1.5)
        engine.loop.run(engine.llm.collective_rpc("fail_to_prepare"))
        with pytest.raises(fp8sync.InstallFailed, match="engine 0: RuntimeError: no memory left"):
            link.refit()
        assert torch.equal(engine.logprobs(), first)
        assert (served.logprobs() - first).abs().max().item() == 0.0

        assert link.refit("keep").version == 2
        second = engine.logprobs()
        assert not torch.equal(second, first)
        assert (served.logprobs() - second).abs().max().item() == 0.0
        link.close()
    finally:
        engine.close()
        served.close()
