"""A skip that nobody listed is a failure; a listed one is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import skips

ROOT = Path(__file__).parents[1]
LISTED = """
import pytest

@pytest.mark.skip(reason="needs 1 CUDA device(s), found 0")
def test_it():
    pass
"""
UNLISTED = LISTED.replace("needs 1 CUDA device(s), found 0", "too slow today")
MODULE = """
import pytest

pytest.importorskip("no_such_module")
"""
XFAIL = """
import pytest

@pytest.mark.xfail(reason="known")
def test_it():
    assert False
"""


def run_pytest(tmp_path: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "test_generated.py"
    path.write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", f"--rootdir={tmp_path}"]
    command += ["--noconftest", "-p", "no:cacheprovider", "-o", "addopts=", *options, str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("source", "closing"),
    [(LISTED, "1 skipped"), (UNLISTED, "1 error"), (MODULE, "1 error"), (XFAIL, "1 xfailed")],
    ids=["listed", "unlisted", "module", "xfail"],
)
def test_strict_skips(tmp_path, source, closing):
    done = run_pytest(tmp_path, source, "--strict-skips")
    assert closing in done.stdout.splitlines()[-1], done.stdout + done.stderr
    assert (done.returncode == 0) == (source in {LISTED, XFAIL})


def test_an_unlisted_skip_names_the_test_and_its_reason(tmp_path):
    done = run_pytest(tmp_path, UNLISTED, "--strict-skips")
    assert "test_generated.py::test_it was skipped" in done.stdout
    assert "with this reason: too slow today" in done.stdout


def test_without_the_option_a_skip_is_a_skip(tmp_path):
    done = run_pytest(tmp_path, UNLISTED)
    assert "1 skipped" in done.stdout.splitlines()[-1], done.stdout + done.stderr


def test_a_line_without_a_reason_is_refused():
    with pytest.raises(ValueError, match=r"allowed_skips\.txt:2: expected"):
        skips.parse("# comment\ntests/test_a.py\n")
