"""Directories in front of a live engine: read as a source, and written for a fresh one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fp8sync
from fp8sync.export import export_checkpoint
from fp8sync.sources import CheckpointSource
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module", params=["dense", "moe"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(kind, an engine on dummy weights), shared by the tests of this file."""
    kind = request.param
    folder = world.write_config(world.tiny_model(kind, 0), tmp_path_factory.mktemp(kind))
    llm = world.start_engine(folder, load_format="dummy")
    yield kind, llm
    del llm
    world.forget_engines()


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_a_directory_is_a_source(live: Any, formula: str, tmp_path: Path) -> None:
    """BF16 and FP8 directories of one model, as transformers and `export_checkpoint` write them."""
    kind, llm = live
    model = world.tiny_model(kind, 5)
    fresh = world.start_engine(world.write_checkpoint(model, tmp_path / "fresh", formula))
    expected = world.logprobs(fresh), world.generate(fresh)
    world.stop_engine(fresh)
    model.save_pretrained(tmp_path / "bf16")
    recipe = f"blockwise-{formula}"
    export_checkpoint(tmp_path / "bf16", tmp_path / "fp8", recipe, progress=False)

    for name in ("bf16", "fp8"):
        fp8sync.refit(world.tiny_model(kind, 6), llm, world.recipe(recipe))
        assert (world.logprobs(llm) - expected[0]).abs().max().item() > 0.0
        report = fp8sync.refit(CheckpointSource(tmp_path / name), llm, world.recipe(recipe))
        assert (world.logprobs(llm) - expected[0]).abs().max().item() == 0.0
        assert world.generate(llm) == expected[1]
        assert all(t.route == "bulk" for t in report.tensors)


@pytest.mark.parametrize("formula", ["pow2", "fp32"])
def test_an_export_loads_as_what_a_refit_leaves(live: Any, formula: str, tmp_path: Path) -> None:
    kind, llm = live
    model = world.tiny_model(kind, 7)
    recipe = world.recipe(f"blockwise-{formula}")
    fp8sync.refit(model, llm, recipe)
    export_checkpoint(model, tmp_path, recipe, progress=False)
    fresh = world.start_engine(tmp_path)
    assert (world.logprobs(fresh) - world.logprobs(llm)).abs().max().item() == 0.0
    assert world.generate(fresh) == world.generate(llm)
    world.stop_engine(fresh)


def test_pairs_into_an_engine_without_fp8(tmp_path: Path) -> None:
    """Refused by name, or dequantized on the way: as an engine that loads the values."""
    model = world.tiny_model("dense", 5)
    model.save_pretrained(tmp_path / "bf16")
    export_checkpoint(tmp_path / "bf16", tmp_path / "fp8", "blockwise-pow2", progress=False)
    values = world.write_checkpoint(model, tmp_path / "values", "pow2", fp8=False)
    fresh = world.start_engine(values)
    expected = world.logprobs(fresh)
    world.stop_engine(fresh)
    config = world.write_config(model, tmp_path / "config", fp8=False)
    llm = world.start_engine(config, load_format="dummy")
    before = world.logprobs(llm)
    source = CheckpointSource(tmp_path / "fp8")
    with pytest.raises(fp8sync.RecipeMismatch, match="on_format_mismatch='requantize'") as error:
        fp8sync.refit(source, llm, "bf16")
    at = "model.layers.0.mlp.up_proj.weight (trainer rank 0)"
    found = "expected bfloat16, found an FP8 pair with pow2 scales"
    assert f"{at}: {found}" in error.value.violations
    assert (world.logprobs(llm) - before).abs().max().item() == 0.0
    allowed = fp8sync.Recipe("bf16", on_format_mismatch="requantize")
    with fp8sync.connect(source, llm, allowed) as link:
        report = link.refit()
        assert link.audit().equal
    assert (world.logprobs(llm) - expected).abs().max().item() == 0.0
    assert all(t.route == "bulk" for t in report.tensors)
    world.stop_engine(llm)


def test_links_of_former_directories_hold_nothing(live: Any, tmp_path: Path) -> None:
    """A directory for each step: only the last link has descriptors and threads, the others' are freed."""
    kind, llm = live
    world.tiny_model(kind, 8).save_pretrained(tmp_path / "0")
    held = []
    for step in range(4):
        folder = tmp_path / str(step)
        if step:
            folder.symlink_to(tmp_path / "0")
        assert fp8sync.refit(str(folder), llm, world.recipe("blockwise-pow2")).version == 1
        held.append((len([*Path("/proc/self/fd").iterdir()]), threading.active_count()))
    assert held[1:] == held[:1] * 3
    # Whoever comes again connects again, and counts on.
    assert fp8sync.refit(str(tmp_path / "0"), llm, world.recipe("blockwise-pow2")).version == 2
    fp8sync.close(engine=llm)
