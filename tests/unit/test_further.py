"""Only what an engine's own config, or a name, says to be MTP may be left out; all else is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fp8sync.engines.vllm.further import not_of_main_model
from fp8sync.errors import TensorMismatch
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan, explain
from fp8sync.plan.coverage import check_all_used
from fp8sync.plan.merge import merge_ranks
from fp8sync.recipe import Encoding, Formula
from fp8sync.report import LazyTensorReports

DEEPSEEK = SimpleNamespace(num_hidden_layers=61, num_nextn_predict_layers=1)
QWEN = SimpleNamespace(num_hidden_layers=48)
WHY = "of a speculative drafter"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("model.layers.61.eh_proj.weight", DEEPSEEK),
        ("model.layers.61.mlp.experts.255.up_proj.weight", DEEPSEEK),
        ("layers.61.enorm.weight", DEEPSEEK),
        ("language_model.model.layers.61.enorm.weight", DEEPSEEK),
        ("model.layers.63.enorm.weight", SimpleNamespace(num_hidden_layers=62, num_mtp_modules=3)),
        ("model.layers.4.fc.weight", SimpleNamespace(num_hidden_layers=4, mtp_num_hidden_layers=1)),
        ("mtp.layers.0.self_attn.q_proj.weight", QWEN),
        ("mtp.fc.weight", QWEN),
        ("model.mtp_layers.0.input_proj.weight", QWEN),
        ("model.mtp.layers.0.eh_proj.weight", QWEN),
        ("model.language_model.mtp.norm.weight", QWEN),
    ],
)
def test_layers_that_predict_further(name: str, config: SimpleNamespace) -> None:
    assert not_of_main_model(name, config).startswith("the engine's loader skips it: ")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("model.layers.60.input_layernorm.weight", DEEPSEEK),
        ("model.layers.62.enorm.weight", DEEPSEEK),
        ("model.layers.61.enorm.weight", SimpleNamespace(num_hidden_layers=61)),
        (
            "model.layers.61.enorm.weight",
            SimpleNamespace(num_hidden_layers=61, num_nextn_predict_layers=None),
        ),
        ("model.layers.48.input_layernorm.weight", QWEN),
        ("model.layers.3.weight", SimpleNamespace()),
        ("visual.layers.61.norm.weight", DEEPSEEK),
        ("model.layers.0.mtp.weight", DEEPSEEK),
        ("mtpx.weight", QWEN),
        ("lm_head.weight", DEEPSEEK),
    ],
)
def test_whatever_else_may_not_be_left_out(name: str, config: SimpleNamespace) -> None:
    assert not not_of_main_model(name, config)


def info(name: str, unused: str = "") -> TensorInfo:
    return TensorInfo(name, (4,), "bfloat16", unused=unused)


def whole(name: str) -> Box:
    return Box(name, (0,), (4,), Placement(name, 0, (1,)))


def worker(rank: int, *infos: TensorInfo) -> Manifest:
    return Manifest.of(infos, {rank: [whole("w")]})


def test_what_nobody_takes_is_refused_unless_all_say_why() -> None:
    excused = merge_ranks([worker(r, info("w"), info("mtp", WHY)) for r in range(2)])
    check_all_used(excused)
    for order in (1, -1):
        both = [worker(0, info("w"), info("mtp", WHY)), worker(1, info("w"), info("mtp"))]
        with pytest.raises(TensorMismatch) as refusal:
            check_all_used(merge_ranks(both[::order]))
        (line,) = refusal.value.violations
        assert line.startswith("mtp (all 2 engine ranks): expected to take all 4 elements")


@pytest.mark.parametrize("takes", [0, 1])
def test_what_somebody_takes_is_not_left_out(takes: int) -> None:
    """By one worker in part: the rest is missed, whatever another one says."""
    half = Box("mtp", (0,), (2,), Placement("mtp", 0, (1,)))
    sides = [worker(r, info("w"), info("mtp", "" if r == takes else WHY)) for r in range(2)]
    held = {takes: [whole("w"), half]}
    sides[takes] = Manifest.of(sides[takes].tensors.values(), held)
    with pytest.raises(TensorMismatch, match="found 2 taken"):
        check_all_used(merge_ranks(sides))


def test_the_plan_and_the_report_name_it() -> None:
    source = Manifest.of([info("w"), info("mtp")], {0: [whole("w"), whole("mtp")]})
    plan = build_plan(source, worker(0, info("w"), info("mtp", WHY)))
    assert [copy.tensor for copy in plan.copies] == ["w"]
    assert explain(plan).splitlines()[:2] == [
        "1 tensors in 1 copies, 8 bytes",
        "bulk: 1 tensors; misc: 0",
    ]
    assert explain(plan).splitlines()[-1] == f"left out mtp: {WHY}"
    told = {t.name: (t.route, t.reason, t.bytes) for t in LazyTensorReports(plan, ())}
    assert told == {"w": ("bulk", "", 8), "mtp": ("left out", WHY, 0)}


def test_a_pair_that_shards_cut_is_left_out_all_the_same() -> None:
    """Such pairs go to the engine's loader otherwise."""
    pair = TensorInfo("mtp", (256, 128), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.FP32)
    scales = Placement("scales", 0, (1, 1))
    halves = [
        Box("mtp", (0, 0), (64, 128), Placement("mtp", 0, (128, 1)), scales),
        Box("mtp", (64, 0), (192, 128), Placement("mtp", 64 * 128, (128, 1)), scales),
    ]
    source = Manifest.of([info("w"), pair], {0: [whole("w"), *halves]})
    unused = replace(pair, unused=WHY)
    plan = build_plan(source, worker(0, info("w"), unused), exchange_amax=True)
    assert [copy.tensor for copy in plan.copies] == ["w"]
    assert plan.tensors["mtp"].unused == WHY
    assert not plan.tensors["mtp"].misc
