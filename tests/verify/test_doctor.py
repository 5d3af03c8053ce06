from __future__ import annotations

import re
from pathlib import Path

import torch

from fp8sync import doctor
from fp8sync.cli import main

ROOT = Path(__file__).parents[2]


def test_it_tells_what_works_here(capsys) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert "yes plan on paper" in said
    assert f"{'yes' if torch.cuda.is_available() else 'no '} transport ipc" in said


def test_a_finding_says_why_not() -> None:
    assert str(doctor.Finding("x", "y is missing", "unused")) == "no  x: y is missing"
    assert str(doctor.Finding("x", note="z")) == "yes x: z"


def test_two_vllms_exclude_each_other(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "0.27.1")
    assert "overwrite each other" in doctor._engine(cuda=False).why_not


def test_versions_out_of_range_are_named(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "0.99.0" if name == "vllm" else "")
    found = doctor._engine(cuda=True).why_not
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least, most = re.search(r'"vllm>=([\d.]+),<([\d.]+)"', extras).groups()
    known = f"0.99.0 is not one of those known: {least} up to, not including, {most}"
    assert known in found


def test_without_torch_it_still_plans(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: "")
    least, paper = doctor.diagnose()
    assert "torch is not installed" in least.why_not
    assert not paper.why_not


def test_an_old_torch_is_named(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2.7.1" if name == "torch" else "")
    assert doctor.diagnose()[0].why_not == "found 2.7.1"
