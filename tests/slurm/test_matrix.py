"""The matrix: which cases there are, what their jobs would do, and what the table calls passed."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from scripts.slurm import matrix

if TYPE_CHECKING:
    from pathlib import Path

PASSED = {
    "agreement": {
        "kl_engine_trainer": 4e-4,
        "kl_trainer_engine": 4e-4,
        "probability_ratio": 1.02,
        "max_difference": 0.1,
    },
    "refits": [{"seconds": {"total": 0.1}}],
    "fresh_difference": 0.0,
    "failures": [],
}


def write(results: Path, name: str, content: dict[str, Any]) -> None:
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(content))


def submitted(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert matrix.main(["submit", *arguments]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("CASE=")]


def test_a_dry_run_submits_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRYRUN", "1")
    results = tmp_path / "results"
    given = ["--results", str(results), "--models", "dense=/m", "gated-moe=/n"]
    lines = submitted(capsys, *given, "--", "--account=A")
    assert not results.exists()
    assert all("--account=A" in line for line in lines)
    names = [line.split("'")[1] for line in lines]
    assert len(names) == len(set(names))
    asked = [name for name, line in zip(names, lines, strict=True) if "requantize" in line]
    assert asked == [name for name in names if "_fp8_bf16_" in name]
    assert asked
    # FP8 parameters are Megatron's alone, expert axes those of models with experts.
    assert "dense_fp8_fp8-kv_tp2_tp4" in names
    assert "gated-moe_fp8_fp8_ep8pp2_tp8" in names
    assert not [n for n in names if n.startswith("dense") and "_ep" in n]
    assert not [n for n in names if "_fp8_fp8_fsdp2" in n or "_fp8_fp8_dp2" in n]


@pytest.mark.parametrize("layout", matrix.layouts())
def test_a_script_says_what_it_would_run(layout: str, tmp_path: Path) -> None:
    case = matrix.Case("dense", "bf16", "fp8-kv", layout)
    settings = case.environment("/models/dense", tmp_path)
    # What `scontrol show hostnames` says of the job's nodes.
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'a\\nb\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, **settings, "DRYRUN": "1", "PATH": path}
    script = matrix.LAYOUTS / f"{layout}.sh"
    done = subprocess.run(
        ["bash", str(script)], cwd=matrix.ROOT, env=environment, check=True, capture_output=True
    )
    said = done.stdout.decode()
    assert "-m torch.distributed.run" in said
    assert "/models/dense --recipe blockwise" in said
    assert "--kv-cache-dtype fp8" in said
    assert not (tmp_path / f"{case.name}.json").exists()


def test_what_is_not_run_is_not_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "dense", PASSED)
    write(tmp_path, "mla", {"not_run": "no MLA here", "failures": []})
    assert matrix.main(["summary", str(tmp_path)]) == 1
    assert matrix.main(["summary", str(tmp_path), "--may-not-run", "dense*"]) == 1
    assert matrix.main(["summary", str(tmp_path), "--may-not-run", "mla*"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "1 of 1 passed; 1 not run"
    assert next(line.split(maxsplit=1)[1] for line in said if line.startswith("mla")) == (
        "not run: no MLA here"
    )


@pytest.mark.parametrize(
    "content", [{**PASSED, "failures": ["policies: too far"]}, {"failures": ["TensorMismatch: x"]}]
)
def test_a_failure_is_named(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "dense", content)
    assert matrix.main(["summary", str(tmp_path), "--may-not-run", "*"]) == 1
    said = capsys.readouterr().out
    assert "FAIL" in said
    assert content["failures"][0] in said


def test_a_job_without_a_result_is_not_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "dense", PASSED)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "gated-moe_bf16_fp8_dp2_dp1-17.log").touch()
    assert matrix.main(["summary", str(tmp_path), "--may-not-run", "*"]) == 1
    said = capsys.readouterr().out
    assert "gated-moe_bf16_fp8_dp2_dp1" in said
    assert "NO RESULT" in said
