from __future__ import annotations

import doctest
import xml.etree.ElementTree as ET

from fp8sync.pages import figures
from fp8sync.pages.verdicts import render
from tests.pages.samples import refused, result


def test_page_is_whole_and_escaped() -> None:
    page = render({"one": result(), "two": result(("audit: <x> differs",))})
    ET.fromstring(page[page.index("<body>") : page.index("</html>")].replace("&nbsp;", " "))
    assert "two: audit: &lt;x&gt; differs" in page
    assert "a&lt;b&gt;.weight" in page
    assert page.count("<svg") == 10


def test_success_is_said_only_without_a_failure() -> None:
    assert "1 of 1 kept to every limit" in render({"one": result()})
    assert "kept to every limit" not in render({"one": result(("no",))})


def test_a_refusal_is_said_and_draws_nothing() -> None:
    page = render({"one": refused()})
    assert "refused: model.layers.0.mlp.up_proj.weight: a hole" in page
    assert "<svg" not in page


def test_what_was_not_run_is_listed_with_its_reason_and_not_counted() -> None:
    page = render({"one": result(), "two": {"not_run": "no <MLA> here", "failures": []}})
    assert "1 of 1 kept to every limit. 1 not run, for reasons below." in page
    assert "<td>two</td><td>no &lt;MLA&gt; here</td>" in page
    assert "Every case ran" in render({"one": result()})
    assert "kept to every limit" not in render({"two": {"not_run": "x", "failures": []}})


def test_a_run_that_was_stopped_has_failures_and_no_figures() -> None:
    page = render({"one": {"failures": ["TransferTimeout: no engine"], "versions": {}}})
    assert "one: TransferTimeout: no engine" in page
    assert "<svg" not in page


def test_errors_that_were_not_measured_draw_nothing() -> None:
    unmeasured = result() | {"errors": {"model.layers.0.mlp.up_proj.weight": float("nan")}}
    assert "errors were not measured" in render({"one": unmeasured})


def test_examples() -> None:
    assert doctest.testmod(figures).failed == 0
