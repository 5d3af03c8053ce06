import math
import re

import pytest

from scripts.demo import main as demo
from scripts.demo.stopwatch import Stopwatch
from tests.demo.samples import sample_round, sample_run


@pytest.fixture
def run_demo(monkeypatch, tmp_path):
    def run(*rounds, arguments=()):
        monkeypatch.setattr(
            demo, "run_model", lambda kind, *_, **__: sample_run(*rounds, kind=kind)
        )
        return demo.main(Stopwatch(), ["--report", str(tmp_path / "demo.html"), *arguments])

    return run


def test_good_rounds_end_in_success_with_a_report(run_demo, tmp_path, capsys):
    assert run_demo(sample_round()) == 0
    assert "<svg" in (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert "ok: in every round" in capsys.readouterr().out


@pytest.mark.parametrize("fresh", [0.02, math.nan])
def test_a_bad_round_ends_in_failure_with_its_name_and_a_report(run_demo, tmp_path, capsys, fresh):
    assert run_demo(sample_round(0), sample_round(1, fresh=fresh)) == 1
    assert (tmp_path / "demo.html").exists()
    output = capsys.readouterr()
    assert "FAILED moe, round 1: fresh KL(engine ‖ trainer)" in output.err
    assert "ok:" not in output.out


def test_a_demo_that_takes_too_long_fails(run_demo, capsys):
    assert run_demo(sample_round(), arguments=("--limit", "0.001")) == 1
    output = capsys.readouterr()
    assert re.search(r"FAILED it took \d+ s: expected at most 0.001 s", output.err)
    assert "ok:" not in output.out
