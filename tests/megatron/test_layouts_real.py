"""Every layout of every family, on four trainer ranks: boxes tile the checkpoint, bytes are its bytes.

Ranks that a layout does not need are data-parallel replicas. `checks.check_layout` says what is asked.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.timeout(2500)  # the first test waits for all cases

LAYOUTS = {
    "qwen3": ["", "tp=2", "tp=4", "tp=2,cp=2", "pp=2", "tp=2,pp=2"],
    "qwen3-4layers": ["pp=2,vpp=2"],
    "qwen3-tied": ["", "pp=2", "tp=2,pp=2"],
    "qwen3-vocab130": ["pad=128,tp=2", "pad=128,tp=4"],
    "llama": ["tp=2", "pp=2"],
    "qwen2": ["", "tp=2"],
    "qwen3-moe": ["", "ep=2", "tp=2", "tp=2,ep=2", "tp=2,ep=4", "tp=2,etp=2", "tp=2,ep=2,pp=2"],
    "deepseek-v3": ["", "tp=2", "tp=2,ep=2", "pp=2"],
}


ENGINES = {kind: layouts for kind, layouts in LAYOUTS.items() if kind != "qwen3-vocab130"}
PAIRS = {
    "qwen3": ["", "tp=2", "tp=4", "tp=2,pp=2"],
    "qwen3-4layers": ["pp=2,vpp=2"],
    "qwen3-moe": ["tp=2,ep=2", "tp=2,etp=2", "tp=2,ep=2,pp=2"],
    "deepseek-v3": ["tp=2,ep=2"],
}
EXPORTS = {"qwen3": ["tp=2"], "qwen3-moe": ["tp=2,ep=2"]}
GROUPED = ["", "ep=2", "tp=2,ep=2", "tp=2,ep=4", "tp=2,etp=2", "tp=2,ep=2,pp=2"]
MASTERS = {"qwen3": ["tp=2", "tp=4"], "qwen3-moe": ["tp=2,ep=2"]}
GATHERED = [
    "check_loose:qwen3:pp=2",
    "check_loose:qwen3-moe:tp=2,ep=2",
    "check_loose:qwen3-moe:tp=2,ep=2,pp=2",
    "check_gathered:qwen3-next:",
    "check_gathered:qwen3-next:tp=2",
    "check_gathered:nemotron-h:",
    "check_gathered:nemotron-h:tp=2",
]
CHECKPOINTS = {
    "qwen3": ["tp=2"],
    "qwen3-4layers": ["pp=2,vpp=2"],
    "qwen3-tied": ["pp=2"],
    "qwen3-vocab130": ["pad=128,tp=2"],
    "qwen3-moe": ["tp=2,ep=2,pp=2"],
    "deepseek-v3": ["tp=2,ep=2"],
    "qwen3-next": ["", "tp=2"],
    "nemotron-h": ["", "tp=2"],
}
KV = {"qwen3": ["tp=2", "tp=4", "pp=2", "tp=2,pp=2"], "qwen3-4layers": ["pp=2,vpp=2"]}
REFUSALS = [
    "check_loose_masters:qwen3:tp=2",
    "check_other_experts:qwen3-moe:",
    "check_other_forms:qwen3:tp=2",
    "check_no_master:qwen3:tp=2",
    "check_nan_master:qwen3:tp=2",
    "check_bad_checkpoint:qwen3:tp=2",
    "check_cut_checkpoint:qwen3-next:tp=2",
    "check_cut_checkpoint:nemotron-h:tp=2",
    "check_bad_pairs:qwen3:",
    "check_wrong_bridge:llama:",
    "check_unregistered:llama:",
    "check_missing_rank:qwen3:tp=2,pp=2",
    "check_changed_form:qwen3:tp=2",
]


def cases(check: str, layouts: dict[str, list[str]]) -> list[str]:
    return [f"{check}:{kind}:{axes}" for kind, found in layouts.items() for axes in found]


@pytest.mark.parametrize("case", cases("check_layout", LAYOUTS))
def test_layout(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", cases("check_engines", ENGINES))
def test_bytes_of_engines_of_several_layouts(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", cases("check_pairs", PAIRS))
def test_fp8_pairs_pass_through(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize(
    "case", ["check_cut_pairs:qwen3-narrow:tp=2", "check_cut_pairs:qwen3-head64:"]
)
def test_cut_pairs_arrive_as_their_values(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", cases("check_export", EXPORTS))
def test_fp8_pairs_are_those_of_the_bridge(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", cases("check_masters", MASTERS))
def test_masters(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", cases("check_grouped", {"qwen3-moe": GROUPED}))
def test_experts_in_one_parameter(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize(
    "case", cases("check_grouped_masters", {"qwen3-moe": ["tp=2,ep=2", "tp=2,etp=2"]})
)
def test_masters_of_experts_in_one_parameter(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize(
    "case", ["check_config:qwen3-moe:tp=2,ep=2", "check_config:qwen3-tied:pp=2"]
)
def test_a_config_is_enough(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", GATHERED)
def test_what_is_no_box_is_gathered_alone(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", cases("check_mtp", {"deepseek-v3": ["pp=2", "tp=2,ep=2"]}))
def test_layers_that_predict_further_tokens(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", cases("check_checkpoint", CHECKPOINTS))
def test_distributed_checkpoints(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", [*cases("check_kv", KV), "check_kv_of_replicas:qwen3:tp=2"])
def test_kv_cache_scales(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", ["check_watch:qwen3:tp=2"])
def test_a_gather_would_be_seen(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize(
    "case", ["check_overlap:qwen3:tp=2", "check_trained_with_overlap:qwen3:tp=2"]
)
def test_parameters_are_complete_before_they_are_read(
    case: str, faults: dict[str, list[str]]
) -> None:
    assert not faults[case], "\n".join(faults[case])


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])
