"""What cannot be moved exactly is refused: all of it at once, by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp8sync.errors import RecipeMismatch, UnsupportedLayout
from fp8sync.layouts import (
    PRESETS,
    EngineLayout,
    TrainerLayout,
    from_config,
    geometry,
    join,
    manifest,
)
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan, cut_pairs
from fp8sync.plan.spread import side_of
from fp8sync.plan.traffic import traffic
from fp8sync.recipe import Encoding, Formula
from fp8sync.wire.payload import view
from tests.layouts import wire
from tests.layouts.cases import HEAD_64, HEAD_80, LATENT, QWEN, RAGGED_MOE, dense


def test_an_engine_whose_fused_scales_collide_is_refused() -> None:
    with pytest.raises(UnsupportedLayout, match=r"parts of \[640, 640, 640\]|\[320, 320, 320\]"):
        manifest(EngineLayout(tp=2), HEAD_80)
    with pytest.raises(UnsupportedLayout, match=r"parts of \[128, 64, 64\]"):
        manifest(EngineLayout(tp=2), replace(HEAD_64, kv_heads=2, heads=4))
    with pytest.raises(UnsupportedLayout, match=r"\[192, 192\] rows"):
        manifest(EngineLayout(), RAGGED_MOE)


def test_an_engine_whose_part_cuts_a_block_takes_it_by_misc() -> None:
    """A head of 192 rows on a rank: no loader can cut that scale."""
    model = replace(LATENT, intermediate=1024, shared_intermediate=512)
    engine = EngineLayout(tp=4, expert_parallel=True)
    destination = manifest(engine, model)
    reasons = {n: i.misc for n, i in destination.tensors.items() if i.misc}
    assert set(reasons) == {f"model.layers.{n}.self_attn.q_b_proj.weight" for n in range(2)}
    assert all("takes [0:192, 0:256]: cuts dim 0" in r for r in reasons.values())
    source = manifest(TrainerLayout(tp=2, ep=2, etp=1), model)
    plan = build_plan(source, destination, exchange_amax=True)
    tensors = wire.random_tensors(source)
    found = wire.storages(destination, None)
    wire.carry_out(plan, wire.storages(source, tensors), found, 60_000)
    wanted = wire.storages(destination, wire.quantized(destination, tensors))
    assert not wire.differing(found, wanted)


def test_without_an_exchange_cut_blocks_are_refused() -> None:
    source = manifest(TrainerLayout(dp=3, fsdp=3), QWEN)
    destination = manifest(EngineLayout(), QWEN)
    with pytest.raises(UnsupportedLayout, match="cuts a 128-block in dim 0") as refusal:
        build_plan(source, destination)
    named = {line.split(":")[0] for line in refusal.value.violations}
    assert named == {n for n in destination.tensors if n.endswith("proj.weight")}


@pytest.mark.parametrize("formula", list(Formula), ids=lambda f: f.value)
def test_a_pair_that_is_cut_takes_the_misc_path(formula: Formula) -> None:
    """Head size 64: one k head on a rank is half a block. It is sent dequantized, whole."""
    model = dense(head_dim=64, heads=4, kv_heads=2)
    source = manifest(TrainerLayout(tp=2, pairs=formula), model)
    destination = manifest(EngineLayout(formula=formula), model)
    plan = build_plan(source, destination, exchange_amax=True)
    reasons = {n: i.misc for n, i in plan.tensors.items() if i.misc}
    names = {f"model.layers.0.self_attn.{n}_proj.weight" for n in "kv"}
    assert set(reasons) == names
    assert "holds [0:64, 0:128] of an FP8 pair" in reasons[min(names)]
    assert cut_pairs(source) == reasons
    for copy in plan.copies:
        if copy.tensor in names:
            assert copy.at.storage == f"misc/{copy.tensor}"
            assert (copy.encoding, copy.dtype) == (Encoding.PLAIN, "float32")
        elif copy.encoding is Encoding.BLOCKWISE:
            assert copy.source_scale_at is not None
    assert not plan.amax
    counted = traffic(side_of(source), side_of(destination))
    assert counted.misc == reasons
    assert counted.copies == len(plan.copies)
    assert counted.total_bytes == sum(c.weight_bytes + c.scale_bytes for c in plan.copies)


@pytest.mark.parametrize("formula", list(Formula), ids=lambda f: f.value)
@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        # The fused rows of k and v share a block.
        (dense(head_dim=64, heads=4, kv_heads=2), TrainerLayout(tp=2)),
        # FSDP cuts rows, tensor parallelism cuts o_proj's columns at 160; both begin blocks anew.
        (dense(head_dim=80, heads=4, kv_heads=4, hidden=320), TrainerLayout(tp=2, dp=3, fsdp=3)),
        (
            dense(head_dim=80, heads=4, kv_heads=4, hidden=320),
            TrainerLayout(tp=2, dp=3, fsdp=3, fsdp_dim=1),
        ),
    ],
    ids=["fused", "rows", "columns"],
)
def test_a_cut_pair_arrives_as_its_values(model, trainer: TrainerLayout, formula: Formula) -> None:
    """Random codes and scales in each rank's own blocks."""
    source = manifest(replace(trainer, pairs=formula), model)
    destination = manifest(EngineLayout(formula=formula, scales=trainer.fsdp == 1), model)
    plan = build_plan(source, destination)
    held = wire.storages(source, None)
    generator = torch.Generator().manual_seed(1)
    for rank in held.values():
        for tensor in rank.values():
            if tensor.dtype == torch.float8_e4m3fn:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    found = wire.storages(wire.with_misc(destination, plan), None)
    wire.carry_out(plan, held, found, 8_000)
    names = {n for n, i in plan.tensors.items() if i.misc}
    for name in names:
        whole = found[0][f"misc/{name}"].view(plan.tensors[name].shape)
        for rank, boxes in source.ranks.items():
            for box in (b for b in boxes if b.tensor == name):
                first = box.scale_origin or (0, 0)
                row = torch.arange(box.shape[0])[:, None] + first[0]
                col = torch.arange(box.shape[1])[None, :] + first[1]
                assert box.scale_at is not None
                at = box.scale_at.offset + row // 128 * box.scale_at.strides[0] + col // 128
                codes = view(held[rank], box.at, box.shape).float()
                wanted = codes * held[rank][box.scale_at.storage][at]
                assert torch.equal(wire.cut(whole, box.start, box.shape), wanted)
    assert names


def test_a_pair_without_scales_is_refused() -> None:
    info = TensorInfo("w", (256, 128), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
    at = Placement("d", 0, (128, 1))
    wanted = Box("w", (0, 0), (256, 128), at, Placement("s", 0, (1, 1)))
    source = Manifest.of([info], {0: [Box("w", (0, 0), (256, 128), at)]})
    with pytest.raises(UnsupportedLayout, match="trainer rank 0 holds codes without scales"):
        build_plan(source, Manifest.of([info], {0: [wanted]}))


def test_a_pair_without_scales_to_slice_takes_the_misc_path() -> None:
    """Fused rows may put a block's first row elsewhere than the HF tensor does."""
    info = TensorInfo("w", (256, 128), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
    at = Placement("d", 0, (128, 1))
    held = Box("w", (0, 0), (256, 128), at, Placement("s", 1, (1, 1)), (64, 0))
    wanted = Box("w", (0, 0), (256, 128), at, Placement("s", 0, (1, 1)))
    source, destination = Manifest.of([info], {0: [held]}), Manifest.of([info], {0: [wanted]})
    plan = build_plan(source, destination, exchange_amax=True)
    assert "not the tensor's" in plan.tensors["w"].misc
    (copy,) = plan.copies
    assert (copy.source_scale_at, copy.source_origin) == (held.scale_at, (64, 0))


def test_formats_that_do_not_fit_are_all_listed() -> None:
    names = ("a", "b", "c", "d")
    at, scale = Placement("s", 0, (128, 1)), Placement("s_scale_inv", 0, (1, 1))

    def side(*infos: TensorInfo) -> Manifest:
        boxes = [Box(i.name, (0, 0), i.shape, at, scale) for i in infos]
        return Manifest.of(infos, {0: boxes})

    fp32 = [
        TensorInfo(n, (128, 128), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.FP32) for n in names
    ]
    wanted = [
        TensorInfo("a", (128, 128), "bfloat16"),
        replace(fp32[1], formula=Formula.POW2),
        fp32[2],
        replace(fp32[3], formula=Formula.POW2),
    ]
    with pytest.raises(RecipeMismatch) as refusal:
        build_plan(side(*fp32), side(*wanted))
    named = [line.split(":")[0] for line in refusal.value.violations]
    assert named == [f"{n} (trainer rank 0)" for n in ("a", "b", "d")]
    # A kernel that keeps any scale keeps powers of two: the pair goes through as it is.
    pow2 = [replace(i, formula=Formula.POW2) for i in fp32]
    plan = build_plan(side(*pow2), side(*fp32))
    assert {c.formula for c in plan.copies} == {Formula.POW2}


def test_an_engine_box_that_cuts_a_block_is_an_error() -> None:
    info = TensorInfo("w", (256, 128), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
    at = Placement("s", 0, (128, 1))
    source = Manifest.of(
        [TensorInfo("w", (256, 128), "bfloat16")], {0: [Box("w", (0, 0), (256, 128), at)]}
    )
    halves = {r: [Box("w", (64 * r, 0), (64, 128), at)] for r in range(4)}
    with pytest.raises(UnsupportedLayout) as refusal:
        build_plan(source, Manifest.of([info], halves), exchange_amax=True)
    assert len(refusal.value.violations) == 4
    assert "w: engine rank 1 wants [64:128, 0:128], which cuts a 128-block" in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 2, "ep": 4, "etp": 2}, r"2 ranks of a stage are no multiple of etp\*ep"),
        ({"dp": 3, "fsdp": 2}, "dp = 3 is no multiple of fsdp = 2"),
        ({"order": "tp-dp"}, "does not name tp, cp, ep, dp and pp"),
    ],
)
def test_a_trainer_that_cannot_exist(settings: dict, message: str) -> None:
    with pytest.raises(UnsupportedLayout, match=message):
        TrainerLayout(**settings)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (TrainerLayout(tp=3), "512 does not divide by 3 ranks"),
        (TrainerLayout(pp=2, stages=(1, 1)), "expected 2\\*1 stages of 1 layers"),
        (EngineLayout(tp=3), "4 does not divide by 3 ranks"),
        (EngineLayout(pp=2, stages=(1, 1)), "expected 2 stages of 1 layers"),
    ],
)
def test_a_model_that_does_not_fit_its_layout(layout, message: str) -> None:
    with pytest.raises(UnsupportedLayout, match=message):
        manifest(layout, QWEN)


def test_qwen3_30b_cannot_be_cut_in_four() -> None:
    """moe_intermediate 768: 192 rows a rank; with expert parallelism the experts stay whole."""
    model = PRESETS["qwen3-30b-a3b"]
    with pytest.raises(UnsupportedLayout, match=r"\[192, 192\]"):
        geometry(EngineLayout(tp=4), model)
    geometry(EngineLayout(tp=4, expert_parallel=True), model)


def test_engines_are_joined_only_if_they_want_the_same() -> None:
    two, one = (manifest(EngineLayout(tp=n), QWEN) for n in (2, 1))
    assert set(join([two, one]).ranks) == {0, 1, 2}
    with pytest.raises(ValueError, match="engine 1"):
        join([two, manifest(EngineLayout(formula=None), QWEN)])


def test_configs_of_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="model_type 'gpt2' is not one of"):
        from_config({"model_type": "gpt2"})
