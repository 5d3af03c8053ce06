"""What cannot be moved is refused by name, at once, and the engine serves on as before."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from fp8sync.engines.vllm import AsyncHandle
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.recipe import Encoding, Formula
from fp8sync.sources import ModuleSource
from fp8sync_kernels import quantize_blockwise
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Edited:
    """A trainer whose list of tensors was changed."""

    def __init__(self, model: torch.nn.Module, edit: Any) -> None:
        self._source, self._edit = ModuleSource(model), edit

    def manifest(self) -> Manifest:
        manifest = self._source.manifest()
        tensors, boxes = self._edit(dict(manifest.tensors), list(manifest.ranks[0]))
        return Manifest.of(tensors.values(), {0: boxes})

    def storages(self) -> Any:
        return self._source.storages()


def without(name: str) -> Any:
    def edit(tensors: dict[str, Any], boxes: list[Any]) -> Any:
        del tensors[name]
        return tensors, [b for b in boxes if b.tensor != name]

    return edit


def renamed(old: str, new: str) -> Any:
    def edit(tensors: dict[str, Any], boxes: list[Any]) -> Any:
        info = tensors.pop(old)
        tensors[new] = replace(info, name=new)
        return tensors, [replace(b, tensor=new) if b.tensor == old else b for b in boxes]

    return edit


def added(name: str, like: str) -> Any:
    def edit(tensors: dict[str, Any], boxes: list[Any]) -> Any:
        tensors[name] = replace(tensors[like], name=name)
        (box,) = (b for b in boxes if b.tensor == like)
        return tensors, [*boxes, replace(box, tensor=name)]

    return edit


def cut_at(name: str, row: int) -> Any:
    def edit(tensors: dict[str, Any], boxes: list[Any]) -> Any:
        (box,) = (b for b in boxes if b.tensor == name)
        rows, cols = box.shape
        upper = replace(box, shape=(row, cols))
        lower = replace(box, start=(row, 0), shape=(rows - row, cols), at=box.at.at((row, 0)))
        return tensors, [*(b for b in boxes if b is not box), upper, lower]

    return edit


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine that serves known weights."""
    model = world.tiny_model("dense", 1)
    folder = world.write_config(model, tmp_path_factory.mktemp("live"))
    llm = world.start_engine(folder, load_format="dummy")
    fp8sync.refit(model, llm, world.recipe("blockwise-pow2"))
    yield llm
    del llm
    world.forget_engines()


@pytest.fixture(autouse=True)
def unchanged(live: Any) -> Iterator[None]:
    """Whatever a test does, the engine serves the same bytes and log-probabilities."""
    logprobs, digests = world.logprobs(live), world.live_bytes(live)
    yield
    assert torch.equal(world.logprobs(live), logprobs)
    assert world.live_bytes(live) == digests


LAST = "model.layers.1.mlp.down_proj.weight"
FIRST = "model.layers.0.self_attn.k_proj.weight"


def test_missing_tensors_are_all_named(live: Any) -> None:
    def edit(tensors: dict[str, Any], boxes: list[Any]) -> Any:
        return without(LAST)(*without(FIRST)(tensors, boxes))

    source = Edited(world.tiny_model("dense", 2), edit)
    with pytest.raises(fp8sync.TensorMismatch) as caught:
        fp8sync.connect(source, live, world.recipe("blockwise"))
    faults = "\n".join(caught.value.violations)
    assert "model.layers.1.mlp.down_proj.weight" in faults
    assert "model.layers.0.self_attn.qkv_proj.weight" in faults
    assert "filled by no tensor" in faults


def test_extra_tensor(live: Any) -> None:
    name = "model.layers.0.mlp.side_proj.weight"
    source = Edited(world.tiny_model("dense", 2), added(name, LAST))
    with pytest.raises(fp8sync.TensorMismatch, match=name):
        fp8sync.connect(source, live, world.recipe("blockwise"))


def test_tensor_that_the_loader_skips_silently(live: Any) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = Edited(world.tiny_model("dense", 2), added(name, "model.norm.weight"))
    with pytest.raises(fp8sync.TensorMismatch, match=r"inv_freq.*found 0 taken"):
        fp8sync.connect(source, live, world.recipe("blockwise"))


def test_misspelled_tensor(live: Any) -> None:
    source = Edited(world.tiny_model("dense", 2), renamed(LAST, LAST.replace("down", "dwon")))
    with pytest.raises(fp8sync.TensorMismatch, match="dwon_proj"):
        fp8sync.connect(source, live, world.recipe("blockwise"))


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 512},  # longer than the engine's: a loader could narrow it
        {"intermediate_size": 256},
        {"num_attention_heads": 6},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"vocab_size": 320},
    ],
    ids=str,
)
def test_model_of_another_size(live: Any, changes: dict[str, int]) -> None:
    with pytest.raises(fp8sync.TensorMismatch) as caught:
        fp8sync.connect(world.tiny_model("dense", 2, **changes), live, world.recipe("blockwise"))
    assert caught.value.violations
    for line in caught.value.violations:
        assert re.match(
            r"[a-z_.0-9]+\.weight(_scale_inv)? \(.*engine rank.*\): .*expected .*", line
        ), line
        assert "found " in line


def test_another_model(live: Any) -> None:
    with pytest.raises(fp8sync.TensorMismatch, match="experts"):
        fp8sync.connect(world.tiny_model("moe", 2), live, world.recipe("blockwise"))


def test_boxes_that_cut_a_block_bring_the_same_bytes(live: Any) -> None:
    """Not bad at all: both boxes are quantized with the block's joint amax."""
    source = Edited(world.tiny_model("dense", 1), cut_at(LAST, 64))
    link = fp8sync.connect(source, live, world.recipe("blockwise-pow2"))
    assert link.plan.plan.amax
    link.refit()
    link.close()


def test_dtype_that_cannot_travel(live: Any) -> None:
    model = world.tiny_model("dense", 2)
    model.model.norm.weight.data = model.model.norm.weight.data.to(torch.complex64)
    with pytest.raises(fp8sync.UnsupportedLayout, match=r"model\.norm\.weight: dtype complex64"):
        fp8sync.connect(model, live, world.recipe("blockwise"))


@pytest.mark.parametrize("name", [LAST, "model.norm.weight"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64, torch.float8_e5m2])
def test_dtype_that_nothing_may_be_cast_from(live: Any, name: str, dtype: torch.dtype) -> None:
    def edit(tensors: dict[str, Any], boxes: list[Any]) -> Any:
        tensors[name] = replace(tensors[name], dtype=str(dtype).removeprefix("torch."))
        return tensors, boxes

    source = Edited(world.tiny_model("dense", 2), edit)
    refusals = (fp8sync.TensorMismatch, fp8sync.UnsupportedLayout)
    with pytest.raises(refusals, match=f"{name}.*dtype"):
        fp8sync.connect(source, live, world.recipe("blockwise"))


def test_requests_that_nobody_steps(live: Any) -> None:
    """`wait` is refused before a weight is looked at; all others can be had."""
    from vllm import SamplingParams

    engine, model = live.llm_engine, world.tiny_model("dense", 2)

    def ask(name: str, **options: Any) -> None:
        params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False, **options)
        engine.add_request(name, {"prompt_token_ids": world.PROMPT}, params)
        while not any(output.outputs[0].token_ids for output in engine.step()):
            pass

    def rest() -> list[int]:
        while engine.has_unfinished_requests():
            last = engine.step()
        return list(last[0].outputs[0].token_ids)

    before = world.generate(live, 8)
    with fp8sync.connect(model, live, world.recipe("blockwise-pow2")) as link:
        ask("kept", temperature=0.0)
        with torch.no_grad():
            weight = model.lm_head.weight.clone()
            model.lm_head.weight[3, 3] = torch.nan
        with pytest.raises(fp8sync.Fp8SyncError, match="1 requests are in flight"):
            link.refit()
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)
        assert link.refit("recompute").version == 1
        tokens = rest()
        same = next(i for i, token in enumerate(before) if tokens[i] != token)
        assert tokens[same:] == world.generate(live, 8 - same, [*world.PROMPT, *tokens[:same]])
        assert same
        ask("held", temperature=0.0)
        assert link.refit("keep").version == 2
        assert rest() == world.generate(live, 8)  # the same weights, so the same keys and values
        ask("aborted", n=2)
        assert engine.get_num_unfinished_requests() == 2
        assert link.refit("abort").version == 3
        assert not engine.has_unfinished_requests()
        assert not engine.output_processor.parent_requests
        assert not live.wait_for_completion(use_tqdm=False)
    fp8sync.refit(world.tiny_model("dense", 1), live, world.recipe("blockwise-pow2"))


def test_engine_that_is_not_quantized(tmp_path: Path) -> None:
    model = world.tiny_model("dense", 2)
    llm = world.start_engine(world.write_config(model, tmp_path, fp8=False), load_format="dummy")
    with pytest.raises(
        fp8sync.RecipeMismatch, match="'blockwise' needs an engine with blockwise FP8"
    ):
        fp8sync.connect(model, llm, "blockwise")


@pytest.mark.skipif(not world.FP8, reason="needs AMX tiles, which this processor lacks")
def test_recipe_that_does_not_quantize(live: Any) -> None:
    with pytest.raises(
        fp8sync.RecipeMismatch, match="'bf16' for an engine that holds FP8"
    ) as caught:
        fp8sync.connect(world.tiny_model("dense", 2), live, "bf16")
    assert any(LAST in line for line in caught.value.violations)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_all_named(live: Any, value: float) -> None:
    model = world.tiny_model("dense", 2)
    with torch.no_grad():
        model.get_parameter(LAST)[5, 7] = value
        model.get_parameter("model.norm.weight")[3] = value
    link = fp8sync.connect(model, live, world.recipe("blockwise"))
    with pytest.raises(fp8sync.NonFiniteWeight) as caught:
        link.refit()
    assert len(caught.value.violations) == 2
    assert f"{LAST} (trainer rank 0): expected finite values, found 1" in caught.value.violations[0]
    link.close()


class Passing(Edited):
    """A trainer that holds one weight as an FP8 pair, which passes through."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        super().__init__(model, self._paired)
        self._name = name
        self.pair = quantize_blockwise(model.get_parameter(name).detach(), "pow2")

    def _paired(self, tensors: dict[str, Any], boxes: list[Any]) -> Any:
        shape = tensors[self._name].shape
        pair = TensorInfo(self._name, shape, "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
        at = Placement("codes", 0, (shape[1], 1))
        scale_at = Placement("scales", 0, (shape[1] // 128, 1))
        boxes = [b for b in boxes if b.tensor != self._name]
        return tensors | {self._name: pair}, [*boxes, Box(self._name, (0, 0), shape, at, scale_at)]

    def storages(self) -> Any:
        own = {"codes": self.pair.weight, "scales": self.pair.scale_inv}
        return {**super().storages(), **own}


@pytest.mark.parametrize("transport", ["auto", "golden"])
def test_nan_in_a_pair_that_passes_through_is_named(live: Any, transport: str) -> None:
    trainer = Passing(world.tiny_model("dense", 2), LAST)
    trainer.pair.weight.view(torch.uint8)[5, 7:9] = torch.tensor([0x7F, 0xFF])
    trainer.pair.scale_inv[1, 1] = torch.inf
    link = fp8sync.connect(trainer, live, world.recipe("blockwise-pow2"), transport=transport)
    with pytest.raises(fp8sync.NonFiniteWeight) as caught:
        link.refit()
    (fault,) = caught.value.violations
    assert f"{LAST} (trainer rank 0): expected finite values, found 3" in fault
    link.close()


def test_engine_without_the_backend(tmp_path: Path) -> None:
    model = world.tiny_model("dense", 2)
    folder = world.write_config(model, tmp_path)
    for config, found in ((None, "None"), ({"backend": "nccl"}, "'nccl'")):
        llm = world.start_engine(folder, load_format="dummy", weight_transfer_config=config)
        with pytest.raises(fp8sync.UnsupportedLayout, match=f"'fp8sync'}}, found backend {found}"):
            fp8sync.connect(model, llm, world.recipe("blockwise"))


def test_engine_that_reaches_its_own_worker_alone(
    live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under torchrun with vLLM's external launcher, where every rank has an LLM around one worker."""
    config = live.llm_engine.vllm_config.parallel_config
    monkeypatch.setattr(config, "distributed_executor_backend", "external_launcher")
    fp8sync.connect(world.tiny_model("dense", 2), live, world.recipe("blockwise")).close()
    monkeypatch.setattr(config, "world_size", 2)
    with pytest.raises(fp8sync.UnsupportedLayout, match="'external_launcher': expected an engine"):
        fp8sync.connect(world.tiny_model("dense", 2), live, world.recipe("blockwise"))


def test_engine_that_reaches_its_own_replicas_alone(
    live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each rank or node, behind a balancer of their own: the others' workers would not come."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    class Configured:
        def __init__(self, **options: Any) -> None:
            folder = world.write_config(world.tiny_model("moe", 2), tmp_path)
            settings = world.settings(folder, load_format="dummy", **options)
            self.vllm_config = AsyncEngineArgs(**settings).create_engine_config()
            self.output_handler = None

    one = Configured(data_parallel_size=2, data_parallel_rank=1)
    node = Configured(
        data_parallel_size=4, data_parallel_size_local=2, data_parallel_hybrid_lb=True
    )
    loop = asyncio.new_event_loop()
    for engine in (one, node):
        with pytest.raises(fp8sync.UnsupportedLayout, match="external or hybrid load balancer"):
            AsyncHandle(engine, loop)
    assert AsyncHandle(Configured(data_parallel_size=2), loop).workers == 2
    loop.close()

    model, recipe = world.tiny_model("dense", 2), world.recipe("blockwise")
    config = live.llm_engine.vllm_config.parallel_config
    with monkeypatch.context() as patch:
        patch.setattr(config, "data_parallel_size", 2)  # as under VLLM_DP_SIZE
        with pytest.raises(fp8sync.UnsupportedLayout, match="all 2 replicas, found one that"):
            fp8sync.connect(model, live, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(config, "data_parallel_external_lb", True)  # which a server does not tell
        with pytest.raises(fp8sync.UnsupportedLayout, match="engine rank 0: data parallel with an"):
            fp8sync.connect(model, live, recipe)
    fp8sync.connect(model, live, recipe).close()


def test_no_engine() -> None:
    with pytest.raises(fp8sync.UnsupportedLayout, match=r"expected a vllm\.LLM"):
        fp8sync.connect(world.tiny_model("dense", 2), object())


def test_unknown_recipe() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'int4'"):
        fp8sync.Recipe("int4")
