"""The matrix: which cases there are, what their jobs would do, and what the table calls passed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from scripts.slurm import matrix
from tests.pages import samples

if TYPE_CHECKING:
    from pathlib import Path

PASSED = samples.result()


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


def dry_run(layout: str, folder: Path, **more: str) -> list[str]:
    """The steps of a layout's job, on as many nodes as its script asks for."""
    script = matrix.LAYOUTS / f"{layout}.sh"
    (nodes,) = re.findall(r"^#SBATCH --nodes=(\d+)$", script.read_text(), re.MULTILINE)
    # What `scontrol show hostnames` says of the job's nodes.
    (folder / "scontrol").write_text(f"#!/bin/sh\nseq --format=node%g {nodes}\n")
    (folder / "scontrol").chmod(0o755)
    settings = matrix.Case("dense", "bf16", "fp8-kv", layout).environment("/models/dense", folder)
    path = f"{folder}:{os.environ['PATH']}"
    environment = {**os.environ, **settings, **more, "DRYRUN": "1", "PATH": path}
    command = ["bash", str(script)]
    done = subprocess.run(
        command, cwd=matrix.ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return [line for line in done.stdout.splitlines() if line.startswith("srun ")]


def option(command: str, name: str) -> str:
    (found,) = re.findall(rf" --{name}[= ](\S+)", command)
    return found


@pytest.mark.parametrize("layout", matrix.layouts())
def test_a_script_says_what_it_would_run(layout: str, tmp_path: Path) -> None:
    (said,) = (step for step in dry_run(layout, tmp_path) if "torch.distributed.run" in step)
    assert "/models/dense --recipe blockwise" in said
    assert "--kv-cache-dtype fp8" in said
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("own_environment", [False, True])
@pytest.mark.parametrize("layout", matrix.layouts())
def test_no_node_is_asked_for_more_than_eight_gpus(
    layout: str, tmp_path: Path, *, own_environment: bool
) -> None:
    more = {"ENGINE_PYTHON": "/vllm/bin/python"} if own_environment else {}
    steps = dry_run(layout, tmp_path, **more)
    (trainer,) = (step for step in steps if "torch.distributed.run" in step)
    hosts = [step for step in steps if "fp8sync.verify.host" in step]
    trains = option(trainer, "nodelist").split(",")
    gpus = Counter(dict.fromkeys(trains, int(option(trainer, "nproc-per-node"))))
    # An engine without a host runs where trainer rank 0 does.
    serves = option(hosts[0], "nodelist") if hosts else trains[0]
    gpus[serves] += int(option(trainer, "engine-tp"))
    if hosts and serves in trains:
        assert option(hosts[0], "trainers-here") == option(trainer, "nproc-per-node")
    assert max(gpus.values()) <= 8
    # A rank for every place of both grids, that of experts and that of all else.
    axes = dict(re.findall(r"(tp|pp|ep)=(\d+)", option(trainer, "trainer")))
    ranks = len(trains) * int(option(trainer, "nproc-per-node"))
    sizes = {name: int(axes.get(name, 1)) for name in ("tp", "pp", "ep")}
    assert ranks % (sizes["tp"] * sizes["pp"]) == 0
    assert ranks % (sizes["ep"] * sizes["pp"]) == 0


def test_a_job_that_is_refused_is_not_run_and_the_others_are_submitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = 'case "$*" in *ep8*) echo "sbatch: error: too many nodes" >&2; exit 1;; esac'
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{refuse}\necho 17\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    given = ["--results", str(tmp_path / "r"), "--models", "gated-moe=/n", "--trainers", "bf16"]
    given += ["--engines", "fp8", "--layouts", "ep8pp2_tp8", "tp2_tp4"]
    assert matrix.main(["submit", *given]) == 0
    assert capsys.readouterr().out == "17 gated-moe_bf16_fp8_tp2_tp4\n"
    assert matrix.main(["summary", str(tmp_path / "r"), "--may-not-run", "*ep8*"]) == 0
    assert "not run: sbatch: error: too many nodes" in capsys.readouterr().out


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
    page = tmp_path / "page.html"
    assert matrix.main(["summary", str(tmp_path), "--report", str(page)]) == 1
    assert "gated-moe_bf16_fp8_dp2_dp1: the job left no result" in page.read_text(encoding="utf-8")
