"""Keys and values that a KV connector holds are forgotten with the weights that they were computed with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from tests.engines import world
from tests.engines.test_async import Engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [(i * 37 + 11) % 256 for i in range(66)]
"""Longer than the four blocks that a connector is asked to keep."""
EMPTIED = {
    "kv_connector": "EmptiedConnector",
    "kv_connector_module_path": "tests.engines.emptied_connector",
    "kv_role": "kv_both",
}


def at(store: Path, connector: dict[str, Any] = EMPTIED) -> dict[str, Any]:
    store.mkdir()
    return {**connector, "kv_connector_extra_config": {"shared_storage_path": str(store)}}


@pytest.mark.parametrize("online", [False, True])
def test_an_external_cache_is_emptied_where_there_is_no_other(tmp_path: Path, online: bool) -> None:
    """Without a prefix cache of vLLM's own there is still the connector's; `keep` leaves it to the link."""
    models = [world.tiny_model("dense", seed) for seed in (1, 2)]
    folder, store = world.write_config(models[0], tmp_path / "config"), tmp_path / "store"
    options = {"block_size": 16, "enable_prefix_caching": False, "kv_transfer_config": at(store)}
    recipe = world.recipe("blockwise-pow2")
    generate: Callable[[], list[int]]
    if online:
        engine = Engine(folder, max_model_len=128, **options)
        llm, generate = engine.llm, lambda: engine.greedy(PROMPT, 12)
    else:
        llm = world.start_engine(folder, load_format="dummy", **options)
        generate = lambda: world.generate(llm, 12, PROMPT)  # noqa: E731
    found = []
    for model in (models[1], models[0], models[1]):
        fp8sync.refit(model, llm, recipe, in_flight="keep")
        assert not [*store.iterdir()]
        found.append(generate())
        assert [*store.iterdir()]
    assert found[0] == found[2] != found[1]
    if online:
        engine.close()
    else:
        fp8sync.close(engine=llm)
        world.forget_engines()
