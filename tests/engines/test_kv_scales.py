"""Scales of an FP8 KV cache: right after every refit, kept when none are sent, refused where they do not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYERS = 2


def scales(seed: int) -> dict[str, float]:
    """Two different scales for each layer; none is a power of two, or exact in BF16."""
    values = iter(torch.rand(2 * LAYERS, generator=torch.Generator().manual_seed(seed)).tolist())
    return {
        f"model.layers.{layer}.self_attn.attn.{kind}_scale": 0.01 + 0.02 * next(values)
        for layer in range(LAYERS)
        for kind in "kv"
    }


def held(llm: Any, kinds: str = "kv") -> dict[str, tuple[float, float]]:
    """By name, (device buffer, host float) of every scale that the engine holds."""

    def read(model: torch.nn.Module) -> dict[str, tuple[float, float]]:
        return {
            f"{name}.{kind}_scale": (
                getattr(module, f"_{kind}_scale").item(),
                getattr(module, f"_{kind}_scale_float"),
            )
            for name, module in model.named_modules()
            for kind in kinds
            if hasattr(module, "_k_scale_float")
        }

    (found,) = llm.apply_model(read)
    return found


def loaded(given: dict[str, float]) -> dict[str, tuple[float, float]]:
    """What a first load makes of scales: its parameters have the model's dtype."""
    rounded = {n: torch.tensor(v, dtype=torch.bfloat16).item() for n, v in given.items()}
    return {n: (v, v) for n, v in rounded.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write_config(world.tiny_model("dense", 0), tmp_path_factory.mktemp("kv"))


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Any]:
    llm = world.start_engine(folder, load_format="dummy", kv_cache_dtype="fp8")
    yield llm
    del llm
    world.forget_engines()


def test_equals_a_fresh_engine_with_these_scales(live: Any, tmp_path: Path) -> None:
    models = [world.tiny_model("dense", seed) for seed in (1, 2)]
    expected = []
    for turn, model in enumerate(models):
        folder = tmp_path / str(turn)
        given = scales(turn) if world.FP8 else None
        world.write_checkpoint(model, folder, "pow2", kv_scales=given)
        fresh = world.start_engine(folder, kv_cache_dtype="fp8")
        if not world.FP8:  # vLLM cannot load scales into a BF16 model: set them by hand
            set_by_hand(fresh, loaded(scales(turn)))
        assert held(fresh) == loaded(scales(turn))
        expected.append(world.decoded_logprobs(fresh))
        world.stop_engine(fresh)
    assert (expected[0] - expected[1]).abs().max().item() > 0.0

    for turn in (0, 1, 0):
        world.generate(live)
        fold(live)
        report = fp8sync.refit(
            models[turn], live, world.recipe("blockwise-pow2"), kv_scales=scales(turn)
        )
        assert folded(live) == {None}
        assert {t.name for t in report.tensors if t.route == "misc"} == set(scales(turn))
        assert held(live) == loaded(scales(turn))
        assert (world.decoded_logprobs(live) - expected[turn]).abs().max().item() == 0.0


_FOLDED = ("bmm1_scale", "bmm2_scale", "_o_scale_float")


def fold(llm: Any) -> None:
    """Leave behind what FlashInfer's forward does, which does not run here: scales folded once and for all."""

    def write(model: torch.nn.Module) -> None:
        for module in model.modules():
            if hasattr(module, "_k_scale_float"):
                module.impl.bmm1_scale = module.impl.bmm2_scale = module._o_scale_float = 2.0

    llm.apply_model(write)


def folded(llm: Any) -> set[float | None]:
    def read(model: torch.nn.Module) -> set[float | None]:
        layers = [m for m in model.modules() if hasattr(m, "_k_scale_float")]
        return {vars(o)[n] for m in layers for o in (m, m.impl) for n in _FOLDED if n in vars(o)}

    (found,) = llm.apply_model(read)
    return found


def set_by_hand(llm: Any, values: dict[str, tuple[float, float]]) -> None:
    def write(model: torch.nn.Module) -> None:
        for name, (device, host) in values.items():
            prefix, _, scale = name.rpartition(".")
            module: Any = model.get_submodule(prefix)
            getattr(module, f"_{scale}").fill_(device)
            setattr(module, f"_{scale}_float", host)

    llm.apply_model(write)


def test_the_scales_are_seen_by_the_engine(live: Any) -> None:
    """The same weights under other scales give other logprobs, and the first ones again come back."""
    model = world.tiny_model("dense", 3)
    given = scales(3)  # and of queries, which some kernels quantize, too
    given |= {n.replace("k_scale", "q_scale"): 0.7 * v for n, v in given.items() if "k_scale" in n}
    link = fp8sync.connect(model, live, world.recipe("blockwise"), kv_scales=given)
    found = []
    for factor in (1.0, 37.0, 1 / 37.0):
        for name in given:
            given[name] *= factor  # read anew by each refit, as the weights are
        link.refit()
        assert held(live, "kvq") == loaded(given)
        found.append(world.decoded_logprobs(live))
    assert (found[0] - found[1]).abs().max().item() > 0.0
    assert (found[0] - found[2]).abs().max().item() == 0.0


def test_scales_stay_where_none_are_sent(live: Any) -> None:
    """Also those that were set by hand: vLLM's own reload resets a BF16 model's to 1.0."""
    model = world.tiny_model("dense", 4)
    set_by_hand(live, loaded(scales(7)))
    fp8sync.refit(model, live, world.recipe("blockwise"))
    assert held(live) == loaded(scales(7))


def fill_with_ones(llm: Any) -> None:
    """As vLLM 0.25 to 0.27 do in `wake_up`: one of their two model runners by itself, else by hand."""
    host = {name: value for name, (_, value) in held(llm).items()}
    llm.collective_rpc(lambda worker: worker.model_runner.post_kv_cache_wake_up())
    assert {name: value for name, (_, value) in held(llm).items()} == host
    set_by_hand(llm, {name: (1.0, value) for name, value in host.items()})
    assert {buffer for buffer, _ in held(llm).values()} == {1.0}


@pytest.mark.parametrize("means", ["forward", "refit", "call"])
def test_scales_are_right_after_the_cache_woke_up(live: Any, means: str) -> None:
    """Before the first forward that uses them, by a refit that sends none, and when asked to."""
    model, recipe = world.tiny_model("dense", 5), world.recipe("blockwise")
    fp8sync.refit(model, live, recipe, kv_scales=scales(5))
    expected = world.decoded_logprobs(live)
    fill_with_ones(live)
    if means == "forward":
        world.generate(live, tokens=1)
    elif means == "refit":
        fp8sync.refit(model, live, recipe)
    else:
        fp8sync.restore_kv_scales(live)
    assert held(live) == loaded(scales(5))
    assert torch.equal(world.decoded_logprobs(live), expected)


def test_incomplete_or_impossible_scales_are_refused(live: Any) -> None:
    model = world.tiny_model("dense", 6)
    some = scales(6)
    first, *_ = some
    before = held(live)
    with pytest.raises(fp8sync.TensorMismatch, match="positive number") as refusal:
        fp8sync.refit(model, live, world.recipe("blockwise"), kv_scales={**some, first: 0.0})
    assert first in str(refusal.value)
    del some[first]
    with pytest.raises(fp8sync.TensorMismatch, match="incomplete") as refusal:
        fp8sync.refit(model, live, world.recipe("blockwise"), kv_scales=some)
    (missing,) = refusal.value.violations
    assert missing == f"{first} (engine rank 0): the trainer does not have it"
    with pytest.raises(fp8sync.TensorMismatch, match="loader refuses"):
        fp8sync.refit(model, live, world.recipe("blockwise"), kv_scales={"model.k_scale": 1.0})
    assert held(live) == before


def test_an_engine_without_an_fp8_cache_refuses_scales(folder: Path) -> None:
    llm = world.start_engine(folder, load_format="dummy")
    model = world.tiny_model("dense", 1)
    refusals = (fp8sync.RecipeMismatch, fp8sync.TensorMismatch)
    with pytest.raises(refusals, match=r"keeps none|loader refuses"):
        fp8sync.refit(model, llm, world.recipe("blockwise"), kv_scales=scales(0))
    world.stop_engine(llm)
