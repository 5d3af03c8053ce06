"""`fp8sync plan` of saved manifests: what is wrong in a file is said, with tensor and rank."""

from __future__ import annotations

import json

import pytest

from fp8sync.errors import UnsupportedLayout
from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.manifest import Manifest
from fp8sync.plan import build_plan
from tests.layouts.cases import DEEP
from tests.layouts.test_plan_command import run


@pytest.mark.parametrize("option", ["--trainer", "--engine"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "found an object of []"),
        ("[1]", "found list"),
        ("{", "found what is not JSON: "),
        ('{"tensors": [], "ranks": []}', "found no ranks: []"),
        ('{"tensors": [], "ranks": {}}', "found no ranks: {}"),
        ('{"tensors": {}, "ranks": {}}', "found no list of tensors: {}"),
        (
            '{"tensors": [], "ranks": {"3": [["w", [0], [1], ["w", 0, [1]], null]]}}',
            "found a box of rank 3 of no tensor listed: w",
        ),
    ],
)
def test_a_file_that_is_no_manifest_is_named(capsys, tmp_path, option, text, message) -> None:
    path = tmp_path / "saved.json"
    path.write_text(text)
    given = {"--model": "llama-3.1-8b", "--trainer": "tp=2", "--engine": "tp=2", option: str(path)}
    status, out, err = run(capsys, *(word for pair in given.items() for word in pair))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert f"{option}: {path}: expected a saved manifest (Manifest.to_json), {message}" in err


WRONG = [
    (("tensors", 0, 1), [1.5, 4], "w: expected as shape a list of sizes, two if blockwise, found"),
    (("tensors", 0, 1), 3, "w: expected as shape a list of sizes, two if blockwise, found 3"),
    (("tensors", 0, 1), [256], "w: expected as shape a list of sizes, two if blockwise, found"),
    (("tensors", 0, 2), "float7", "w: expected as dtype one of float64, "),
    (("tensors", 0, 2), [], "w: expected as dtype one of float64, "),
    (("tensors", 0, 3), "rowwise", "w: expected as encoding one of plain, blockwise, found"),
    (("tensors", 0, 4), "e8m0", "w: expected as formula pow2, fp32 or null, found"),
    (("tensors", 0, 5), None, "w: expected as misc and unused text, found [null]"),
    (("tensors", 0), ["w"], "a tensor that is no [name, shape, dtype, encoding, formula, misc]"),
    (("ranks",), {"a": []}, 'a rank that is no number: "a"'),
    (("ranks", "3"), {}, "no list of boxes of rank 3: {}"),
    (("ranks", "3", 0), ["w"], "a box of rank 3 that is no [tensor, start, shape, at, scale_at]"),
    (("ranks", "3", 0, 0), "v", "a box of rank 3 of no tensor listed: v"),
    (("ranks", "3", 0, 1), [0.5, 0], "w (rank 3): expected start and shape of 2 dims, found [0.5"),
    (("ranks", "3", 0, 1), [True, 0], "w (rank 3): expected start and shape of 2 dims, found [tr"),
    (("ranks", "3", 0, 2), [256], "w (rank 3): expected start and shape of 2 dims, found [0, 0]"),
    (("ranks", "3", 0, 1), [1, 0], "w (rank 3): expected a box within (256, 128), found [1:257,"),
    (("ranks", "3", 0, 3, 1), 0.5, "w (rank 3): expected as at [storage, offset, [2 strides]]"),
    (("ranks", "3", 0, 3, 1), [0], "w (rank 3): expected as at [storage, offset, [2 strides]]"),
    (("ranks", "3", 0, 4), [], "w (rank 3): expected as scale_at [storage, offset, [2 strides]]"),
    (("ranks", "3", 0, 5), [64], "w (rank 3): expected a scale_origin of 2 dims, found [64]"),
]


def edited(*edits) -> str:
    """A manifest of one pair on rank 3, with some values replaced."""
    box = ["w", [0, 0], [256, 128], ["w", 0, [128, 1]], ["s", 0, [1, 1]], [0, 0]]
    tensors = [["w", [256, 128], "float8_e4m3fn", "blockwise", "pow2", ""]]
    data = json.loads(json.dumps({"tensors": tensors, "ranks": {"3": [box]}}))
    for path, value, _ in edits:
        *way, last = path
        inner = data
        for key in way:
            inner = inner[key]
        inner[last] = value
    return json.dumps(data)


@pytest.mark.parametrize("option", ["--trainer", "--engine"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong[0][-1]}={wrong[1]}")
def test_what_is_wrong_in_a_manifest_is_named(capsys, tmp_path, option, wrong) -> None:
    path, sound = tmp_path / "saved.json", tmp_path / "sound.json"
    path.write_text(edited(wrong))
    sound.write_text(edited())
    given = {"--trainer": str(sound), "--engine": str(sound)}
    assert run(capsys, *(word for pair in given.items() for word in pair))[0] == 0
    given[option] = str(path)
    status, out, err = run(capsys, *(word for pair in given.items() for word in pair))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert (
        f"{option}: {path}: expected a saved manifest (Manifest.to_json), found {wrong[2]}" in err
    )


def test_all_that_is_wrong_in_a_manifest_is_listed(capsys, tmp_path) -> None:
    path = tmp_path / "saved.json"
    path.write_text(edited(*(WRONG[n] for n in (3, 13, 17))))
    status, out, err = run(capsys, "--trainer", str(path), "--engine", str(path))
    assert (status, out) == (1, "")
    first, *faults = err.splitlines()
    assert first.endswith("expected a saved manifest (Manifest.to_json), found 3 faults")
    wanted = [WRONG[n][2] for n in (3, 13, 17)]
    assert all(f.startswith(f"  - {w}") for f, w in zip(faults, wanted, strict=True))


def test_what_the_trainer_lacks_is_named_as_a_plan_names_it(capsys, tmp_path) -> None:
    """The manifest of one rank lists all tensors, and boxes of its own layers alone."""
    whole = manifest(TrainerLayout(pp=3), DEEP)
    source = Manifest(whole.tensors, {1: whole.ranks[1]})
    destination = manifest(EngineLayout(), DEEP)
    for side, name in ((source, "trainer.json"), (destination, "engine.json")):
        (tmp_path / name).write_text(json.dumps(side.to_json()))
    files = "--trainer", str(tmp_path / "trainer.json"), "--engine", str(tmp_path / "engine.json")
    status, out, err = run(capsys, *files)
    with pytest.raises(UnsupportedLayout) as refusal:
        build_plan(source, destination)
    assert (status, out) == (1, "")
    assert sorted(err.splitlines()) == sorted(f"fp8sync: {refusal.value}".splitlines())
    assert "needs [0:512, 0:128]; the trainer's boxes do not cover it" in err
