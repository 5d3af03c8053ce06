"""By NCCL into live engines on other GPUs: a communicator of the link's own, beside the engine's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from tests.engines import serving, world
from tests.engines.test_async import Engine

if TYPE_CHECKING:
    from pathlib import Path

    import torch

RECIPE = "blockwise-pow2"


def on(gpu: int, models: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Away from the engine's GPUs: NCCL takes one rank per GPU."""
    return [model.to(f"cuda:{gpu}") for model in models]


def become(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Give a model another's weights, where its own lie."""
    model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(
    "workers", [pytest.param(n, marks=pytest.mark.multigpu(n + 1)) for n in (1, 2)]
)
def test_refits_equal_fresh_loads(kind: str, workers: int, tmp_path: Path) -> None:
    # Halved between two workers, 512 and 256 rows are still whole blocks.
    sizes = {"intermediate_size": 512} if kind == "dense" else {"moe_intermediate_size": 256}
    models = on(workers, [world.tiny_model(kind, seed, **sizes) for seed in (0, 1, 2)])
    options: dict[str, Any] = {"multiprocess": True, "tensor_parallel_size": workers}
    expected = []
    for number, model in enumerate(models[1:]):
        checkpoint = world.write_checkpoint(model, tmp_path / str(number), "pow2")
        fresh = world.start_engine(checkpoint, **options)
        expected.append((world.logprobs(fresh), world.generate(fresh)))
        world.stop_engine(fresh)
    live, *others = models
    config = world.write_config(live, tmp_path / "config")
    llm = world.start_engine(config, load_format="dummy", **options)
    with fp8sync.connect(live, llm, world.recipe(RECIPE), transport="nccl") as link:
        assert link.transport.startswith("nccl")
        for version, turn in enumerate((0, 1, 0), 1):  # over one communicator
            become(live, others[turn])
            assert link.refit().version == version
            found = world.logprobs(llm)
            assert (found - expected[turn][0]).abs().max().item() == 0.0
            assert world.generate(llm) == expected[turn][1]
    world.stop_engine(llm)


@pytest.mark.multigpu(2)
def test_an_engine_that_holds_no_fp8(tmp_path: Path) -> None:
    """Codes travel; the worker decodes them."""
    (model,) = on(1, [world.tiny_model("dense", 1)])
    checkpoint = world.write_checkpoint(model, tmp_path / "fresh", "pow2", fp8=False)
    fresh = world.start_engine(checkpoint, multiprocess=True)
    expected = world.logprobs(fresh)
    world.stop_engine(fresh)
    config = world.write_config(model, tmp_path / "config", fp8=False)
    llm = world.start_engine(config, load_format="dummy", multiprocess=True)
    recipe = fp8sync.Recipe(RECIPE, dequantize=True)
    with fp8sync.connect(model, llm, recipe, transport="nccl") as link:
        for _ in range(2):
            link.refit()
            assert (world.logprobs(llm) - expected).abs().max().item() == 0.0
    world.stop_engine(llm)


@pytest.mark.multigpu(2)
@pytest.mark.usefixtures("one_thread")
def test_an_engine_that_generates_meanwhile(tmp_path: Path) -> None:
    old, new = on(1, serving.models())
    expected = []
    for name, model in (("old", old), ("new", new)):
        checkpoint = world.write_checkpoint(model, tmp_path / name, "pow2")
        fresh = world.start_engine(checkpoint, multiprocess=True)
        expected.append(world.logprobs(fresh))
        world.stop_engine(fresh)
    engine = Engine(world.write_config(old, tmp_path / "config"))
    with fp8sync.connect(old, engine.llm, world.recipe(RECIPE), transport="nccl") as link:
        link.refit()
        assert (engine.logprobs() - expected[0]).abs().max().item() == 0.0
        before = serving.greedy(engine.greedy)
        become(old, new)
        found, _ = engine.loop.run(
            serving.refit_under_load(engine.stream, lambda: link.refit(in_flight="keep"))
        )
        assert (engine.logprobs() - expected[1]).abs().max().item() == 0.0
        after = serving.greedy(engine.greedy)
        serving.judge("keep", found, before, after, engine.greedy)
    engine.close()
