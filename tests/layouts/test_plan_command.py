"""`fp8sync plan`: figures from two lines of text, or from saved manifests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fp8sync.cli import main
from fp8sync.layouts import (
    PRESETS,
    EngineLayout,
    ModelShape,
    TrainerLayout,
    from_config,
    geometry,
    manifest,
)
from fp8sync.layouts.parse import parse_engine, parse_model, parse_settings, parse_trainer
from fp8sync.layouts.pieces import join_sides
from fp8sync.plan import build_plan
from fp8sync.plan.forecast import Bandwidths, forecast
from fp8sync.plan.route import first_senders, turn
from fp8sync.plan.spread import side_of
from fp8sync.plan.traffic import Traffic, traffic
from fp8sync.recipe import Formula
from tests.layouts.cases import LATENT, LLAMA, QWEN, RAGGED_MOE

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 4,
    "moe_intermediate_size": 192,
}


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_layouts_and_manifests_give_the_same_figures(capsys, tmp_path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    model = from_config(CONFIG)
    source = manifest(TrainerLayout(tp=2, dp=2, ep=2, etp=1), model)
    destination = manifest(EngineLayout(dp=2, expert_parallel=True, scales=False), model)
    for side, name in ((source, "trainer.json"), (destination, "engine.json")):
        (tmp_path / name).write_text(json.dumps(side.to_json()))
    on_paper = run(
        capsys,
        *("--model", str(tmp_path), "--trainer", "tp=2,dp=2,ep=2,etp=1"),
        *("--engine", "dp=2,ep,scales=no", "--json"),
    )
    saved = run(
        capsys,
        *("--trainer", str(tmp_path / "trainer.json")),
        *("--engine", str(tmp_path / "engine.json"), "--json"),
    )
    assert on_paper == saved
    assert on_paper[0] == 0
    plan = build_plan(source, destination, exchange_amax=True)
    figures = json.loads(on_paper[1])
    assert figures["copies"] == len(plan.copies)
    assert figures["bytes"] == sum(c.weight_bytes + c.scale_bytes for c in plan.copies)
    assert figures["tensors"] == len(plan.tensors)


def test_tied_weights_have_the_same_senders_on_paper_and_in_manifests() -> None:
    """Their holders are of two stages, whose ranks alternate where stages are not the slowest axis."""
    trainer = TrainerLayout(tp=2, dp=3, pp=2, order="tp-pp-cp-ep-dp")
    engine = EngineLayout(pp=2, engines=2)
    paper = traffic(geometry(trainer, LLAMA), geometry(engine, LLAMA))
    saved = traffic(side_of(manifest(trainer, LLAMA)), side_of(manifest(engine, LLAMA)))
    assert paper.links == saved.links


def test_the_text_says_what_there_is_to_know(capsys) -> None:
    arguments = ("--model", "qwen3-30b-a3b", "--trainer", "dp=8,fsdp=8", "--top", "3")
    status, out, _ = run(capsys, *arguments, "--engine", "tp=2", "--engine", "tp=4,ep")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("18,867 tensors in ")
    assert sum(line.startswith("link ") for line in lines) == 3
    for part in ("messages", "peak memory, trainer rank", "peak memory, engine rank"):
        assert part in out
    assert "partial amax: " in out  # 768 rows of an expert on 8 ranks
    assert "wire time: " in out
    assert "forwarding: " in out
    assert lines[-1] == "misc: 0 tensors"


def test_it_says_what_is_forwarded_and_why(capsys) -> None:
    """Four replicas on one node beside the trainer's, and the same on nodes of their own."""
    sides = ("--model", "llama-3.1-8b", "--trainer", "tp=2", "--engine", "tp=2,engines=4")
    _, out, _ = run(capsys, *sides, "--json")
    together = json.loads(out)
    assert "bytes are forwarded, each node being fed once: " in together["forwarding"]
    assert together["wire_s"] < 0.5 * together["direct_wire_s"]
    part = together["forwarded_bytes"] / together["bytes"]
    assert 3 / 4 < part < 0.7501  # norms lie on all eight ranks
    assert any(name.startswith("engine ") for name, _ in together["top_links"])
    _, out, _ = run(capsys, *sides, "--bandwidth", "gpus_per_node=2")
    assert "forwarding: nothing is forwarded: feeding each node once would take " in out
    _, out, _ = run(capsys, *sides, "--bandwidth", "gpus_per_node=1")
    assert "forwarding: nothing is forwarded: no two engine ranks of a node want the same" in out


def test_the_misc_list_comes_with_reasons(capsys, tmp_path) -> None:
    model = replace(LATENT, intermediate=1024, shared_intermediate=512)
    for layout, name in (
        (TrainerLayout(), "trainer.json"),
        (EngineLayout(tp=4, expert_parallel=True), "engine.json"),
    ):
        (tmp_path / name).write_text(json.dumps(manifest(layout, model).to_json()))
    sides = ("--trainer", str(tmp_path / "trainer.json"), "--engine", str(tmp_path / "engine.json"))
    _, out, _ = run(capsys, *sides)
    reason = "engine rank 0 takes [0:192, 0:256]: cuts dim 0"
    assert out.splitlines()[-3:] == [
        "misc: 2 tensors",
        f"  model.layers.0.self_attn.q_b_proj.weight: {reason}",
        f"  model.layers.1.self_attn.q_b_proj.weight: {reason}",
    ]


def test_pairs_that_do_not_fit_are_refused_or_converted(capsys, tmp_path) -> None:
    sides = TrainerLayout(tp=2, pairs=Formula.FP32), EngineLayout(formula=Formula.POW2)
    held, wanted = (manifest(side, QWEN) for side in sides)
    for name, side in (("held.json", held), ("wanted.json", wanted)):
        (tmp_path / name).write_text(json.dumps(side.to_json()))
    paths = str(tmp_path / "held.json"), "--engine", str(tmp_path / "wanted.json")
    status, _, err = run(capsys, "--trainer", *paths)
    assert (status, "on_format_mismatch='requantize'" in err) == (1, True)
    anew = "--on-format-mismatch", "requantize"
    status, out, _ = run(capsys, "--trainer", *paths, "--json", *anew)
    plan = build_plan(held, wanted, requantize=True)
    assert (status, json.loads(out)["copies"]) == (0, len(plan.copies))
    assert json.loads(out)["bytes"] == sum(c.weight_bytes + c.scale_bytes for c in plan.copies)


def test_a_layout_that_cannot_be_is_an_error(capsys) -> None:
    status, out, err = run(capsys, "--model", "qwen3-30b-a3b", "--trainer", "", "--engine", "tp=4")
    assert (status, out) == (1, "")
    assert "the engine fuses parts of [192, 192] rows" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no-such"), "neither a config.json nor one of"),
        (("--trainer", "tp=0"), "--trainer: tp: expected at least 1, found 0"),
        (("--trainer", "dp=-1,ep=0"), "--trainer: dp: expected at least 1, found -1; ep: expected"),
        (("--trainer", "etp=-1"), "--trainer: etp: expected at least 0, found -1"),
        (("--trainer", "pp=2,stages=-1:33"), "--trainer: stages[0]: expected at least 0, found -1"),
        (("--trainer", "pairs=fp8"), "--trainer: pairs: expected none or one of pow2, fp32, found"),
        (("--engine", "tp=-1"), "--engine: tp: expected at least 1, found -1"),
        (("--engine", "engines=0"), "--engine: engines: expected at least 1, found 0"),
        (("--bandwidth", "node_gb_s=0"), "--bandwidth: node_gb_s: expected more than 0, found 0.0"),
        (("--bandwidth", "network_gb_s=nan"), "network_gb_s: expected more than 0, found nan"),
        (("--bandwidth", "gpus_per_node=0"), "gpus_per_node: expected more than 0, found 0"),
        (("--bandwidth", "message_us=-1"), "message_us: expected at least 0, found -1.0"),
        (("--bucket-bytes", "0"), "--bucket-bytes: expected at least 1, found 0"),
        (("--top", "-1"), "--top: expected at least 0, found -1"),
        (("--trainer", "pt=2"), "TrainerLayout has no 'pt'"),
        (("--trainer", "tp=two"), "--trainer: tp: expected an integer, found 'two'"),
        (("--engine", "ep=maybe"), "expected true or false"),
        (("--engine", "no.json"), "No such file"),
        (("--bandwidth", "gb=1"), "Bandwidths has no 'gb'"),
    ],
)
def test_what_cannot_be_understood_is_said(capsys, arguments, message) -> None:
    given = {"--model": "llama-3.1-8b", "--trainer": "tp=2", "--engine": "tp=2"}
    if arguments[0] == "--engine":
        given.pop("--engine")
    given[arguments[0]] = arguments[1]
    status, _, err = run(capsys, *(word for pair in given.items() for word in pair))
    assert status == 1
    assert message in err
    assert err.count("\n") == 1


def test_a_config_without_what_is_needed_is_named(capsys, tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}))
    status, _, err = run(capsys, "--model", str(path), "--trainer", "", "--engine", "")
    assert (status, err) == (1, f"fp8sync: --model: {path}: expected 'hidden_size', found none\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a model's config.json, found list"),
        ("null", "expected a model's config.json, found NoneType"),
        ("{", "expected a model's config.json, found what is not JSON: "),
        (b"\xff", "expected a model's config.json, found what is not JSON: "),
        ("{}", "model_type None is not one of llama, "),
        ({"head_dim": None, "num_attention_heads": "4"}, "found one that is malformed: TypeError"),
        ({"head_dim": None, "num_attention_heads": 0}, "is malformed: ZeroDivisionError"),
        ({"num_hidden_layers": "2"}, "expected integers of at least 0, found layers '2'"),
        ({"hidden_size": -1, "vocab_size": 1.5}, "found hidden -1, vocabulary 1.5"),
    ],
)
def test_a_file_that_is_no_config_is_named(capsys, tmp_path, text, message) -> None:
    path = tmp_path / "config.json"
    text = json.dumps({**CONFIG, **text}) if isinstance(text, dict) else text
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    status, out, err = run(capsys, "--model", str(path), "--trainer", "tp=1", "--engine", "tp=1")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"fp8sync: --model: {path}: ")
    assert message in err


def test_a_layout_needs_a_model(capsys) -> None:
    status, _, err = run(capsys, "--trainer", "tp=2", "--engine", "tp=2")
    assert status == 1
    assert "say of which --model" in err


def test_settings_as_text() -> None:
    assert parse_trainer("tp=2,pp=2,vpp=2,stages=1:2:1:1,pairs=pow2") == TrainerLayout(
        tp=2, pp=2, vpp=2, stages=(1, 2, 1, 1), pairs=Formula.POW2
    )
    assert parse_trainer("order=tp-pp-cp-ep-dp,fused=false").order == "tp-pp-cp-ep-dp"
    assert parse_engine("ep,formula=none,round_robin") == EngineLayout(
        expert_parallel=True, formula=None, round_robin=True
    )
    assert parse_settings(Bandwidths, "node_gb_s=100.5").node_gb_s == 100.5
    with pytest.raises(ValueError, match="misc cannot be given as text"):
        parse_engine("misc=x")
    assert parse_model("deepseek-v3") is PRESETS["deepseek-v3"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("deepseek-v3", 671_026_419_200),
    ],
)
def test_full_size_models_have_their_published_size(name: str, parameters: int) -> None:
    found = 0
    for tensor in PRESETS[name].tensors:
        size = 1
        for n in tensor.shape:
            size *= n
        found += size
    assert found == parameters


def test_bandwidths_say_how_long() -> None:
    """Two trainer ranks, two engine ranks: 10 GB within a node, 1 GB to the next."""
    moved = Traffic({}, {(0, 0): 10**10, (1, 1): 10**9}, 2, {0: 0, 1: 0}, {0: 0, 1: 0})
    near = Bandwidths(gpus_per_node=2, node_gb_s=100.0, network_gb_s=50.0, message_us=0.0)
    assert forecast(moved, near).chosen.seconds == pytest.approx(10 / 50)
    assert forecast(moved, near).chosen.network_bytes == 11 * 10**9
    together = Bandwidths(2, 100.0, 50.0, 0.0, same_nodes=True)
    assert forecast(moved, together).chosen.seconds == pytest.approx(10 / 100)
    assert forecast(moved, together).chosen.rank == "trainer 0"
    slow = Bandwidths(2, 1e9, 1e9, 1000.0)
    assert forecast(moved, slow).chosen.seconds == pytest.approx(38 * 1e-3)  # 38 buckets of 256 MiB


@pytest.mark.parametrize(("dp", "engines"), [(2, 1), (3, 1), (4, 2), (8, 1), (8, 16), (5, 7)])
def test_replicas_share_the_sending(dp: int, engines: int) -> None:
    model = ModelShape(16, 256, 512, 512, 4, 4, 128)
    found = traffic(
        geometry(TrainerLayout(dp=dp), model), geometry(EngineLayout(engines=engines), model)
    )
    sent = [found.sent()[rank] for rank in range(dp)]
    assert max(sent) < 1.15 * sum(sent) / dp


@pytest.mark.parametrize(("dp", "engines"), [(2, 1), (2, 3), (4, 6)])
def test_replicas_share_small_tensors_that_are_many(dp: int, engines: int) -> None:
    """Thousands of expert matrices, each less than a thousandth of a rank's load."""
    model = PRESETS["qwen3-30b-a3b"]
    found = traffic(
        geometry(TrainerLayout(dp=dp), model), geometry(EngineLayout(engines=engines), model)
    )
    assert max(found.sent().values()) < 1.02 * sum(found.sent().values()) / dp


def test_replicas_take_into_account_what_else_a_rank_sends() -> None:
    """Rank 0 alone has the experts: the other replica of the dense layers sends more of those."""
    spreads = dict(side_of(manifest(TrainerLayout(dp=2), QWEN)).spreads)
    first = first_senders(spreads)
    load: Counter[int] = Counter()
    for name, spread in spreads.items():
        for i, ranks in enumerate(spread.ranks):
            load[ranks[first[name][i]]] += 1
    assert set(load) == {0, 1}
    assert [turn(rank, 2) for rank in range(8)] == [0, 1, 1, 0, 1, 0, 0, 1]


def test_engines_of_different_layouts_are_fed_together() -> None:
    sides = [geometry(EngineLayout(tp=n), QWEN) for n in (1, 2)]
    found = traffic(geometry(TrainerLayout(), QWEN), join_sides(sides))
    assert set(found.received()) == {0, 1, 2}
    assert found.received()[1] + found.received()[2] < 1.02 * found.received()[0]
    with pytest.raises(ValueError, match="engine 1"):
        join_sides([sides[0], geometry(EngineLayout(formula=None), QWEN)])


def test_planning_needs_no_torch() -> None:
    """The rooms of planning, imported alone, bring in neither torch nor an engine."""
    code = (
        "import sys, types; package = types.ModuleType('fp8sync'); "
        "package.__path__ = ['fp8sync']; sys.modules['fp8sync'] = package; "
        "import fp8sync.cli; print(sorted({'torch', 'vllm', 'triton', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert found.stdout.strip() == "[]"


def test_ragged_experts_are_on_the_list_of_cut_blocks() -> None:
    counted = traffic(
        geometry(TrainerLayout(dp=4, fsdp=4), RAGGED_MOE),
        geometry(EngineLayout(scales=False), RAGGED_MOE),
    )
    assert counted.amax.tensors > 4 * 3
