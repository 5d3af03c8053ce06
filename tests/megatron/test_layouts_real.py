"""Every layout of every family, on four trainer ranks: boxes tile the checkpoint, bytes are its bytes.

Ranks that a layout does not need are data-parallel replicas. `checks.check_layout` says what is asked.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.timeout(900)  # the first test waits for all cases

LAYOUTS = {
    "qwen3": ["", "tp=2", "tp=4", "tp=2,cp=2", "pp=2", "tp=2,pp=2"],
    "qwen3-4layers": ["pp=2,vpp=2"],
    "qwen3-tied": ["", "pp=2", "tp=2,pp=2"],
    "llama": ["tp=2", "pp=2"],
    "qwen2": ["", "tp=2"],
    "qwen3-moe": ["", "ep=2", "tp=2", "tp=2,ep=2", "tp=2,ep=4", "tp=2,etp=2", "tp=2,ep=2,pp=2"],
    "deepseek-v3": ["", "tp=2", "tp=2,ep=2", "pp=2"],
}


@pytest.mark.parametrize(
    "case", [f"check_layout:{kind}:{axes}" for kind, found in LAYOUTS.items() for axes in found]
)
def test_layout(case: str, faults: dict[str, list[str]]) -> None:
    assert not faults[case], "\n".join(faults[case])
