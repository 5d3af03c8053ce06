from html.parser import HTMLParser

import pytest

from fp8sync.pages.figures import sqnr_by_layer
from scripts.demo.page import render, write_page
from tests.demo.samples import sample_round, sample_run


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page():
    rounds = sample_round(0, text="a <b> & c"), sample_round(1)
    runs = sample_run(*rounds), sample_run(*rounds, kind="moe")
    return render(runs, {"train": 1.0}, [], "The engine holds BF16")


def test_it_loads_nothing_from_elsewhere(page):
    for tag, attributes in Elements(page).found:
        assert tag not in {"script", "img", "iframe", "object"}
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "@import" not in page


def test_ids_are_unique_and_references_reach_them(page):
    found = Elements(page).found
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    references = [a["xlink:href"][1:] for _, a in found if "xlink:href" in a]

    assert len(ids) == len(set(ids))
    assert set(references) <= set(ids)


def test_every_plot_is_there_for_every_model_in_themed_colours(page):
    plots = [attributes for tag, attributes in Elements(page).found if tag == "svg"]

    assert len(plots) == 4 * 2
    assert "#0101" not in page
    assert "#0606" not in page
    assert "var(--fresh)" in page


def test_what_the_engine_writes_is_escaped(page):
    assert "a &lt;b&gt; &amp; c" in page


def test_failures_are_on_the_page(tmp_path):
    path = tmp_path / "new" / "demo.html"
    write_page(path, (sample_run(),), {}, ["dense, round 1: stale is less"], "mode")

    assert "dense, round 1: stale is less" in path.read_text(encoding="utf-8")


def test_errors_are_grouped_by_layer_and_projection():
    errors = {
        "model.layers.1.mlp.experts.0.gate_proj.weight": 0.1,
        "model.layers.1.mlp.experts.1.gate_proj.weight": 0.1,
        "model.layers.0.self_attn.q_proj.weight": 0.01,
        "lm_head.weight": 0.5,
    }

    assert sqnr_by_layer(errors) == {(1, "experts gate_proj"): 20.0, (0, "q_proj"): 40.0}
