"""The misc path on a live engine: what only the engine's own loader can place, one version with the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from fp8sync.engines.vllm.misc import check_finite, load_misc
from fp8sync.engines.vllm.staging import Staging
from fp8sync.engines.vllm.storage import (
    MISC,
    EngineLayout,
    StorageSpec,
    misc_scales,
    misc_specs,
    scale_specs,
)
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan, fill_buckets
from fp8sync.recipe import Encoding, Formula
from fp8sync.sources import ModuleSource
from fp8sync.wire.payload import pack, unpack
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise
from tests import skips
from tests.engines import world
from tests.engines.test_kv_scales import held

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

GATE = "model.layers.0.mlp.gate_proj.weight"
HALF = 192  # rows: one block and a half


@pytest.fixture(autouse=True)
def _no_engines_left() -> Iterator[None]:
    yield
    world.forget_engines()


def test_transformed_tensors_equal_a_fresh_load(tmp_path: Path) -> None:
    """GPT-NeoX stores q, k and v head by head; vLLM's loader puts them in another order."""
    models = [world.tiny_model("neox", seed) for seed in (1, 2)]
    checkpoint = world.write_checkpoint(models[1], tmp_path / "1", None, fp8=False)
    fresh = world.start_engine(checkpoint)
    expected = world.logprobs(fresh)
    world.stop_engine(fresh)
    folder = world.write_config(models[0], tmp_path / "config", fp8=False)
    live = world.start_engine(folder, load_format="dummy")
    for turn in (0, 1, 0, 1):
        report = fp8sync.refit(models[turn], live, "bf16")
        difference = (world.logprobs(live) - expected).abs().max().item()
        assert (difference == 0.0) == (turn == 1)
    misc = {t.name: t.reason for t in report.tensors if t.route == "misc"}
    assert set(misc) == {
        f"gpt_neox.layers.{layer}.attention.query_key_value.{kind}"
        for layer in range(2)
        for kind in ("weight", "bias")
    }
    assert set(misc.values()) == {"the loader computes what it stores"}


def test_each_worker_takes_its_shard_of_whole_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers with processes of their own, and KV-cache scales on both."""
    workers = 2 if torch.cuda.device_count() != 1 else 1
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(n) for n in range(workers)))
    options = {"multiprocess": True, "tensor_parallel_size": workers, "kv_cache_dtype": "fp8"}
    models = [world.tiny_model("neox", seed) for seed in (1, 2)]
    checkpoint = world.write_checkpoint(models[1], tmp_path / "1", None, fp8=False)
    llm = world.start_engine(checkpoint, **options)
    fresh = torch.cat([world.logprobs(llm), world.decoded_logprobs(llm)])
    scales = {
        f"gpt_neox.layers.{layer}.attention.attn.{kind}_scale": 0.01 * (layer + 1)
        for layer in range(2)
        for kind in "kv"
    }
    found = []
    ones = dict.fromkeys(
        scales, 1.0
    )  # what a fresh BF16 engine has, and vLLM cannot load otherwise
    for turn, given in ((0, scales), (1, scales), (1, ones)):
        report = fp8sync.refit(models[turn], llm, "bf16", kv_scales=given)
        assert sum(t.route == "misc" for t in report.tensors) == 4 + len(scales)
        found.append(torch.cat([world.logprobs(llm), world.decoded_logprobs(llm)]))
    world.stop_engine(llm)
    differences = [(f - fresh).abs().max().item() for f in found]
    assert differences[2] == 0.0 < min(differences[:2])


class CutPair:
    """A trainer with one weight as an FP8 pair in two shards, each quantized by itself: cut inside a block."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._source = ModuleSource(model)
        weight = model.get_parameter(GATE).detach()
        self.parts = [quantize_blockwise(half, "pow2") for half in weight.split(HALF)]

    def manifest(self) -> Manifest:
        own = self._source.manifest()
        shape = own.tensors[GATE].shape
        pair = TensorInfo(GATE, shape, "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
        boxes = [b for b in own.ranks[0] if b.tensor != GATE]
        for n in range(2):
            at = Placement(f"part{n}", 0, (shape[1], 1))
            scale_at = Placement(f"part{n}_scale_inv", 0, (shape[1] // 128, 1))
            boxes.append(Box(GATE, (n * HALF, 0), (HALF, shape[1]), at, scale_at, (0, 0)))
        return Manifest.of([*({**own.tensors, GATE: pair}).values()], {0: boxes})

    def storages(self) -> dict[str, torch.Tensor]:
        found = dict(self._source.storages())
        for n, part in enumerate(self.parts):
            found[f"part{n}"], found[f"part{n}_scale_inv"] = part.weight, part.scale_inv
        return found


def test_a_pair_cut_inside_a_block_is_quantized_anew_by_the_engine(tmp_path: Path) -> None:
    model = world.tiny_model("dense", 1)
    source = CutPair(model)
    folder = world.write_config(model, tmp_path / "config")
    live = world.start_engine(folder, load_format="dummy")
    report = fp8sync.refit(source, live, world.recipe("blockwise-pow2"))
    misc = {t.name: t.reason for t in report.tensors if t.route == "misc"}
    assert set(misc) == {GATE}
    assert "holds [0:192, 0:256] of an FP8 pair, which cuts a 128-block" in misc[GATE]

    values = [dequantize_blockwise(p.weight, p.scale_inv, torch.bfloat16) for p in source.parts]
    with torch.no_grad():
        model.get_parameter(GATE).copy_(torch.cat(values))  # exact: 4 bits times a power of two
    plain = () if world.FP8 else (GATE,)  # an engine without FP8 is given the values themselves
    fresh = world.start_engine(world.write_checkpoint(model, tmp_path / "1", "pow2", plain=plain))
    assert (world.logprobs(live) - world.logprobs(fresh)).abs().max().item() == 0.0


@pytest.mark.parametrize("formula", list(Formula), ids=lambda f: f.value)
@pytest.mark.parametrize("staged", ["pair", "pair's scales", "float16"])
def test_a_cut_pair_is_quantized_anew_also_where_the_trace_staged_it(
    staged: str, formula: Formula
) -> None:
    """From two trainer ranks into a worker's memory, and on to its loader."""
    name, shape = "a.weight", (2 * HALF, 256)
    pair = TensorInfo(name, shape, "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
    shards = torch.randn(shape, generator=torch.Generator().manual_seed(1)).split(HALF)
    parts = [quantize_blockwise(shard, "pow2") for shard in shards]
    ranks = {}
    for n in range(2):
        at, scale_at = Placement("codes", 0, (256, 1)), Placement("scales", 0, (2, 1))
        ranks[n] = [Box(name, (n * HALF, 0), (HALF, 256), at, scale_at)]
    dtype = "float16" if staged == "float16" else pair.dtype
    wanted = replace(pair, dtype=dtype, formula=formula, misc="it cannot be cut")
    storage = "a.weight" if staged == "pair's scales" else MISC + name
    scale_at = None if staged == "float16" else misc_scales(wanted)
    box = Box(name, (0, 0), shape, Placement(storage, 0, (256, 1)), scale_at)
    if staged == "pair's scales":  # Recipe(scales="misc")
        wanted = replace(wanted, misc="")
        specs = scale_specs([wanted], [box])
    else:
        specs = misc_specs([wanted], scales=scale_at is not None)
    layout = EngineLayout(Manifest.of([wanted], {0: [box]}), specs)

    plan = build_plan(Manifest.of([pair], ranks), layout.manifest, exchange_amax=True)
    layout = layout.with_misc_of(plan)
    staging = Staging(torch.device("cpu"), 0)
    staging.lay_out([layout.storages])
    views = staging.views()
    for view in views.values():
        view.view(torch.uint8).fill_(0x7F)  # NaN in whatever is left
    for bucket in fill_buckets(plan.to_rank(0)):
        part = parts[bucket.source_rank]
        payload = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        pack(bucket, {"codes": part.weight, "scales": part.scale_inv}, payload)
        unpack(bucket, payload, views)
    model = Fed()
    load_misc(model, views, layout.quantize)

    values = [dequantize_blockwise(p.weight, p.scale_inv, torch.float32) for p in parts]
    expected = {name: torch.cat(values)}
    if staged != "float16":
        q = quantize_blockwise(expected[name], formula.value)
        expected = {name: q.weight, name + "_scale_inv": q.scale_inv}
    assert [(n, t.dtype) for n, t in model.fed] == [(n, t.dtype) for n, t in expected.items()]
    for fed, tensor in model.fed:
        assert torch.equal(bits(tensor), bits(expected[fed]))
    assert not any(module.startswith(MISC) for module in layout.processed)


class Fed:
    """Keeps what a loader is fed."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.fed = list(weights)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


class Gathered:
    """A trainer some of whose tensors are no boxes of its parameters; it says so of them."""

    REASON = "mapping class OwnMapping is not known to be boxes"
    NAMES = (GATE, "model.layers.1.self_attn.k_proj.weight", "model.norm.weight")

    def __init__(self, model: torch.nn.Module) -> None:
        self._source = ModuleSource(model)
        self.storages = self._source.storages

    def manifest(self) -> Manifest:
        own = self._source.manifest()
        infos = (
            replace(info, misc=self.REASON) if info.name in self.NAMES else info
            for info in own.tensors.values()
        )
        return Manifest.of(infos, own.ranks)


def test_what_the_trainer_gathers_takes_the_engines_loader(tmp_path: Path) -> None:
    models = [world.tiny_model("dense", seed) for seed in (1, 2)]
    folder = world.write_config(models[0], tmp_path / "config")
    live = world.start_engine(folder, load_format="dummy")
    found = []
    for model in models:
        with fp8sync.connect(Gathered(model), live, world.recipe("blockwise-pow2")) as link:
            report = link.refit()
            told = link.plan.explain()
        found.append(world.logprobs(live))
        misc = {t.name: t.reason for t in report.tensors if t.route == "misc"}
        assert misc == dict.fromkeys(Gathered.NAMES, Gathered.REASON)
        assert f"misc {GATE}: {Gathered.REASON}" in told
    world.stop_engine(live)
    for model, seen in zip(models, found, strict=True):
        fresh = world.start_engine(world.write_checkpoint(model, tmp_path / "fresh", "pow2"))
        assert (world.logprobs(fresh) - seen).abs().max().item() == 0.0
        world.stop_engine(fresh)


def peeking_model(kept: bool) -> str:
    """Register a Qwen3 whose loader looks at the value of a norm, and keeps or loses that norm."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    class Peeking(Qwen3ForCausalLM):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            return super().load_weights(self._looked_at(weights))

        def _looked_at(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Any]:
            for name, weight in weights:
                if name != "model.norm.weight" or (weight.sum().item() != 0.0 and kept):
                    yield name, weight

    name = f"Peeking{'Keeper' if kept else 'Loser'}ForCausalLM"
    ModelRegistry.register_model(name, Peeking)
    return name


def test_a_loader_that_looks_at_values_gets_them(tmp_path: Path) -> None:
    """Where the norm goes cannot be traced: every module is staged, and all are one version."""
    model = world.tiny_model("dense", 1)
    checkpoint = world.write_checkpoint(model, tmp_path / "1", "pow2")
    fresh = world.start_engine(checkpoint)
    expected = world.logprobs(fresh)
    model.config.architectures = [peeking_model(kept=True)]
    live = world.start_engine(world.write_config(model, tmp_path / "c"), load_format="dummy")
    report = fp8sync.refit(model, live, world.recipe("blockwise-pow2"))
    (misc,) = (t for t in report.tensors if t.route == "misc")
    assert misc.name == "model.norm.weight"
    assert "looks at the data" in misc.reason
    assert (world.logprobs(live) - expected).abs().max().item() == 0.0


def test_what_the_loader_loses_is_found_before_the_commit(tmp_path: Path) -> None:
    model = world.tiny_model("dense", 1)
    model.config.architectures = [peeking_model(kept=False)]
    live = world.start_engine(world.write_config(model, tmp_path / "c"), load_format="dummy")
    before = world.logprobs(live)
    with pytest.raises(fp8sync.InstallFailed) as failure:
        fp8sync.refit(model, live, world.recipe("blockwise-pow2"))
    assert "model.norm.weight: 256 of 256 elements were filled by nothing" in str(failure.value)
    assert (world.logprobs(live) - before).abs().max().item() == 0.0


def overflowing(kind: str) -> tuple[Any, Any, str, torch.Tensor]:
    """Return a model, a trainer, its tensor of the misc path, and of that a value that may be made large."""
    model = world.tiny_model("neox" if kind == "computed" else "dense", 1)
    if kind == "cut pair":
        source = CutPair(model)
        return model, source, GATE, source.parts[0].scale_inv[0, 0]
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    if kind == "looked at":
        name = "model.norm.weight"
        model.config.architectures = [peeking_model(kept=True)]
    return model, model, name, model.get_parameter(name).detach().view(-1)[3]


@pytest.mark.parametrize("commit", ["staged", "in-place"])
@pytest.mark.parametrize("kind", ["computed", "cut pair", "looked at"])
def test_what_the_loader_casts_to_infinity_is_refused(
    kind: str, commit: str, tmp_path: Path
) -> None:
    """Finite at the trainer, where all that is sent is looked at; infinite in float16."""
    model, source, name, value = overflowing(kind)
    folder = world.write_config(model, tmp_path, fp8=False)
    live = world.start_engine(folder, load_format="dummy", dtype="float16")
    recipe = fp8sync.Recipe("blockwise-pow2", dequantize=True) if kind == "cut pair" else "bf16"
    with fp8sync.connect(source, live, recipe, commit=commit, bucket_bytes=1 << 18) as link:
        whole = "portions" not in link.commit
        assert whole == (commit == "staged" or kind == "looked at")  # that may go into any module
        link.refit()
        before = world.logprobs(live)
        old = value.clone()
        value.copy_(torch.tensor(2e5 if kind != "cut pair" else 1e6))
        expected = fp8sync.NonFiniteWeight if whole else fp8sync.EngineUnusable
        with pytest.raises(expected) as failure:
            link.refit()
        error = failure.value if whole else failure.value.__cause__
        assert isinstance(error, fp8sync.NonFiniteWeight)
        (fault,) = error.violations
        said = f"{name} (engine rank 0): expected values that are finite in float16, found "
        assert fault.startswith(said)
        if whole:
            assert torch.equal(world.logprobs(live), before)
        value.copy_(old)
        link.refit()
        assert torch.equal(world.logprobs(live), before)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(2.0)
        link.refit()
    after = world.logprobs(live)
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_a_kv_scale_that_the_loader_casts_to_infinity_is_refused(tmp_path: Path) -> None:
    model = world.tiny_model("dense", 1)
    folder = world.write_config(model, tmp_path, fp8=False)
    options = {"load_format": "dummy", "dtype": "float16", "kv_cache_dtype": "fp8"}
    if skips.cuda_devices():
        options["attention_backend"] = "TRITON_ATTN"  # FlashAttention lacks it
    live = world.start_engine(folder, **options)
    names = [f"model.layers.{n}.self_attn.attn.{kind}_scale" for n in range(2) for kind in "kv"]
    fp8sync.refit(model, live, "bf16", kv_scales=dict.fromkeys(names, 0.5))
    before = held(live)
    scales = dict.fromkeys(names, 0.25) | {names[2]: 1e5}
    with pytest.raises(fp8sync.NonFiniteWeight) as failure:
        fp8sync.refit(model, live, "bf16", kv_scales=scales)
    said = "(engine rank 0): expected values that are finite in float16, found 1 NaN or Inf"
    assert failure.value.violations == (f"{names[2]} {said}",)
    assert held(live) == before
    fp8sync.refit(model, live, "bf16", kv_scales=dict.fromkeys(names, 0.25))
    assert held(live) == dict.fromkeys(before, (0.25, 0.25))


def test_infinity_that_the_loader_fills_in_by_itself_is_kept() -> None:
    """Padding of what it loads, as traced; and whatever the trainer's values do not go into."""
    model = torch.nn.Module()
    model.router = torch.nn.Module()
    padded = (((6,), (2,)), -torch.inf), (((0,), (0,)), 1.0)
    spec = StorageSpec((8,), (1,), torch.float16, padded)
    loaded = spec.fill(torch.ones(8, dtype=torch.float16))
    model.router.bias = torch.nn.Parameter(loaded, requires_grad=False)
    model.router.mask = torch.nn.Parameter(torch.full((4,), -torch.inf), requires_grad=False)
    code = torch.tensor([0x7E, 0x01], dtype=torch.uint8).view(torch.float8_e4m3fn)
    model.router.weight = torch.nn.Parameter(code, requires_grad=False)
    names = "gate.bias", "gate.other"
    layout = EngineLayout(
        Manifest({}, {5: ()}),
        {"router.bias": spec, "router.weight": StorageSpec((2,), (1,), code.dtype)},
        open=frozenset({"router.bias"}),
        by_loader={"router.bias": names, "router.weight": names[1:]},
    )
    staged = {MISC + name: torch.ones(6) for name in names}
    check_finite(model, layout, staged)
    for index, value, large in ((2, 1e5, 1), (6, 1e5, 1), (6, -1e5, 0), (1, torch.nan, 0)):
        loaded[index] = value
        staged[MISC + names[0]][2] = value
        if large:
            with pytest.raises(fp8sync.NonFiniteWeight) as failure:
                check_finite(model, layout, staged)
            (fault,) = failure.value.violations
            said = "expected values that are finite in float16, found 1 NaN or Inf"
            assert fault == f"gate.bias (engine rank 5): {said}"
        else:
            check_finite(model, layout, staged)  # NaN: what nothing has filled is told elsewhere
        loaded[index] = 1.0 if index < 6 else -torch.inf
    loaded[2], staged[MISC + names[0]][2] = torch.inf, 1.0  # computed of values that would fit
    with pytest.raises(fp8sync.NonFiniteWeight, match=r"gate\.bias, gate\.other \(engine rank 5\)"):
        check_finite(model, layout, staged)
