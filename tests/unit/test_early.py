"""What workers of vLLM 0.24 are wrapped in, around workers that note their calls; with that version: CONTRIBUTING.md."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fp8sync.engines.vllm import early


class Backend:
    """Notes what reaches it; an update of nothing fails."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def start_weight_update(self) -> None:
        self.heard.append("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.heard.append("update")
        if not update_info:
            raise ValueError("nothing")

    def finish_weight_update(self) -> None:
        self.heard.append("finish")


class Worker:
    """One of vLLM 0.24."""

    def __init__(self, backend: str | None) -> None:
        transfer = None if backend is None else SimpleNamespace(backend=backend)
        self.vllm_config = SimpleNamespace(weight_transfer_config=transfer)
        self.weight_transfer_engine = Backend()
        self._weight_update_active = False
        self.own: list[Any] = []

    def start_weight_update(self, is_checkpoint_format: bool = True) -> None:
        self.own.append(("start", is_checkpoint_format))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.own.append(("update", update_info))

    def finish_weight_update(self) -> None:
        self.own.append(("finish",))


@pytest.fixture
def wrapped() -> type[Worker]:
    kind = type("Wrapped", (Worker,), {})
    for name in ("start_weight_update", "update_weights", "finish_weight_update"):
        setattr(kind, name, early._left_to_backend(name, getattr(Worker, name)))
    return kind


def test_an_update_is_left_to_our_backend(wrapped: type[Worker]) -> None:
    worker = wrapped("fp8sync")
    for _ in range(2):
        worker.start_weight_update(is_checkpoint_format=True)
        worker.update_weights({"version": 1})
        worker.update_weights(update_info={"version": 1})
        worker.finish_weight_update()
    assert worker.weight_transfer_engine.heard == ["start", "update", "update", "finish"] * 2
    assert not worker.own


def test_calls_out_of_turn(wrapped: type[Worker]) -> None:
    """An update that fails is over, as from 0.25 on."""
    worker = wrapped("fp8sync")
    for call in (worker.finish_weight_update, lambda: worker.update_weights({"version": 1})):
        with pytest.raises(RuntimeError, match="expected an update, found none"):
            call()
    worker.start_weight_update()
    with pytest.raises(RuntimeError, match="expected no update, found one under way"):
        worker.start_weight_update()
    with pytest.raises(ValueError, match="nothing"):
        worker.update_weights({})
    with pytest.raises(RuntimeError, match="expected an update, found none"):
        worker.finish_weight_update()
    worker.start_weight_update()


@pytest.mark.parametrize("backend", ["nccl", None])
def test_other_backends_are_vllms_own_matter(wrapped: type[Worker], backend: str | None) -> None:
    worker = wrapped(backend)
    worker.start_weight_update(False)
    worker.update_weights({"names": []})
    worker.finish_weight_update()
    assert worker.own == [("start", False), ("update", {"names": []}), ("finish",)]
    assert not worker.weight_transfer_engine.heard


def test_what_of_a_pool_is_asleep() -> None:
    calls: list[Any] = []
    records = {0: SimpleNamespace(tag="weights"), 1: SimpleNamespace(tag="kv_cache")}
    pool = SimpleNamespace(pointer_to_data=records)
    sleep = early._noting_sleep(lambda _, **named: calls.append(named))
    wake_up = early._noting_waking(lambda _, tags: calls.append(tags))

    def asleep() -> set[str]:
        return {record.tag for record in records.values() if record.is_asleep}

    sleep(pool, offload_tags=("weights",))
    assert asleep() == {"weights", "kv_cache"}
    wake_up(pool, ["weights"])
    assert asleep() == {"kv_cache"}
    wake_up(pool)
    assert asleep() == set()
    assert calls == [{"offload_tags": ("weights",)}, ["weights"], None]


class Model:
    """Loads while nobody may make a backend of vLLM's own way."""

    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def load(self, worker: Any) -> None:
        assert worker.vllm_config.weight_transfer_config is None
        if self._fails:
            raise MemoryError

    def get_model(self) -> str:
        return "model"


@pytest.mark.parametrize("fails", [False, True])
def test_our_backend_is_made_as_by_later_versions(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = pytest.importorskip("fp8sync.engines.vllm.backend")
    made: list[Any] = []
    monkeypatch.setattr(backend, "Fp8SyncWeightTransferEngine", lambda *args: made.append(args))
    worker: Any = Worker("fp8sync")
    worker.model_runner, worker.device = Model(fails), "cpu"
    transfer = worker.vllm_config.weight_transfer_config
    load_model = early._making_backend(lambda worker, **_: worker.model_runner.load(worker))
    if fails:
        with pytest.raises(MemoryError):
            load_model(worker)
    else:
        load_model(worker, load_dummy_weights=True)
    assert worker.vllm_config.weight_transfer_config is transfer
    assert made == ([] if fails else [(transfer, worker.vllm_config, "cpu", "model")])
