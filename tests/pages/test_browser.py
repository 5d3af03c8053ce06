"""The reports in a real browser, wide and narrow, light and dark."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from fp8sync.pages.verdicts import render
from scripts.demo.page import render as render_demo
from tests.demo.samples import sample_round, sample_run
from tests.pages.samples import refused, result

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")
WIDTHS = (1440, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=["verify", "matrix", "demo"])
def page_html(request: pytest.FixtureRequest) -> str:
    if request.param == "demo":
        run = sample_run(sample_round(0), sample_round(1))
        return render_demo((run, run), {"train": 1.0}, [], "The engine holds BF16")
    if request.param == "verify":
        return render({"Qwen3-8B": result()})
    failures = ("policies: kl_engine_trainer: 0.3, above the limit 0.01",)
    cases = {f"dense_bf16_fp8_ep4tp2pp2_tp{n}": result() for n in range(3)}
    cases["mla_bf16_fp8_tp2_tp4"] = refused()
    cases["hybrid_bf16_fp8_two_nodes"] = {"not_run": "the engine does not start: " + "x" * 90}
    return render(cases | {"gated-moe_fp8_fp8-kv_ep8pp2_tp8": result(failures)})


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_error_and_no_overflow(
    browser: Any, page_html: str, width: int, scheme: str, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    path.write_text(page_html, encoding="utf-8")
    view = {"width": width, "height": 900}
    page = browser.new_page(viewport=view, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(path.as_uri())
    found = page.evaluate(
        "[innerWidth, document.documentElement.scrollWidth, document.images.length]"
    )
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    assert found[0] == width
    assert found[1] <= width
    assert [each for each in said if each not in {path.as_uri(), "data:,"}] == []
    assert (background == "rgb(255, 255, 255)") is (scheme == "light")
