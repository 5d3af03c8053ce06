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


def start(folder: Path, **options: Any) -> Any:
    """In a process of its own, as a connector is the only one of its process."""
    return world.start_engine(folder, multiprocess=True, load_format="dummy", **options)


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
        llm = start(folder, **options)
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
        world.stop_engine(llm)


def test_a_connector_that_cannot_forget_is_refused(tmp_path: Path) -> None:
    """Before anything is sent, and by name, also as one of several: vLLM takes all of them for emptied."""
    model = world.tiny_model("dense", 1)
    forgets = at(tmp_path / "a")
    keeps = at(tmp_path / "b", {"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [forgets, keeps]},
    }
    folder = world.write_config(model, tmp_path / "config")
    llm = start(folder, block_size=16, kv_transfer_config=both)
    before = world.generate(llm)
    with pytest.raises(fp8sync.UnsupportedLayout, match="overrides reset_cache") as refusal:
        fp8sync.connect(model, llm, world.recipe("blockwise-pow2"))
    (line,) = refusal.value.violations
    assert line.startswith("ExampleConnector (engine rank 0)")
    assert world.generate(llm) == before
    world.stop_engine(llm)


def warned_of(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Connectors that `check_connectors` warns of; raises what it raises."""
    from vllm.config import KVTransferConfig

    from fp8sync.engines.vllm import connectors

    found: list[str] = []
    monkeypatch.setattr(connectors.logger, "warning_once", lambda _, name: found.append(name))
    connectors.check_connectors(KVTransferConfig(**config), 0)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "OffloadingConnector",
        "SimpleCPUOffloadConnector",
        "MooncakeStoreConnector",
        "NixlConnector",
        "NixlPushConnector",
        "MooncakeConnector",
        "MoRIIOConnector",
        "ExampleHiddenStatesConnector",
        "NoSuchConnector",
    ],
)
def test_connectors_without_old_keys_and_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that can be emptied, that only hand over, and that cannot be looked at here."""
    assert not warned_of({"kv_connector": name, "kv_role": "kv_both"}, monkeypatch)


@pytest.mark.parametrize(
    ("name", "role", "refused"),
    [
        ("LMCacheConnectorV1", "kv_both", True),
        ("LMCacheConnectorV1", "kv_consumer", False),
        ("FlexKVConnectorV1", "kv_both", True),
        ("HF3FSKVConnector", "kv_both", True),
        ("UnknownConnector", "kv_both", False),
    ],
)
def test_connectors_that_vllm_does_not_empty(
    name: str, role: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused where it is known that they keep something, else named in vLLM's log."""
    config = {"kv_connector": name, "kv_role": role}
    if name == "UnknownConnector":
        config["kv_connector_module_path"] = "tests.engines.emptied_connector"
    if not refused:
        assert warned_of(config, monkeypatch) == [name]
        return
    with pytest.raises(fp8sync.UnsupportedLayout, match=f"{name} .engine rank 0.: expected"):
        warned_of(config, monkeypatch)
