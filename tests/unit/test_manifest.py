"""Manifests are plain data: they survive JSON, and their digest follows every field."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8sync.manifest import ITEMSIZE, Box, Manifest, Placement, TensorInfo, canonical_json
from fp8sync.recipe import Encoding, Formula

names = st.text(min_size=1, max_size=12)
numbers = st.integers(0, 2**53)
triples = st.lists(numbers, max_size=3).map(tuple)
placements = st.builds(Placement, names, numbers, triples)
boxes = st.builds(Box, names, triples, triples, placements, st.none() | placements)
infos = st.builds(
    TensorInfo,
    names,
    triples,
    st.sampled_from(sorted(ITEMSIZE)),
    st.sampled_from(Encoding),
    st.none() | st.sampled_from(Formula),
    st.text(max_size=20),
    st.text(max_size=20),
)
manifests = st.builds(
    Manifest.of,
    st.lists(infos, max_size=4, unique_by=lambda info: info.name),
    st.dictionaries(st.integers(0, 40), st.lists(boxes, max_size=3), max_size=4),
)


@given(manifests)
def test_json_is_lossless(manifest: Manifest) -> None:
    text = json.dumps(manifest.to_json(), allow_nan=False)
    again = Manifest.from_json(json.loads(text))
    assert again == manifest
    assert list(again.tensors) == list(manifest.tensors)
    assert list(again.ranks) == sorted(manifest.ranks)
    assert again.digest() == manifest.digest()


@given(manifests, manifests)
def test_digests_differ_where_manifests_do(a: Manifest, b: Manifest) -> None:
    same = list(a.tensors.values()) == list(b.tensors.values()) and a.ranks == b.ranks
    assert (a.digest() == b.digest()) == same


PLAIN = TensorInfo("w", (4, 4), "bfloat16")
BOX = Box("w", (0, 0), (4, 4), Placement("s", 0, (4, 1)))


@pytest.mark.parametrize(
    ("info", "box"),
    [
        (replace(PLAIN, shape=(4, 5)), BOX),
        (replace(PLAIN, dtype="float16"), BOX),
        (replace(PLAIN, encoding=Encoding.BLOCKWISE), BOX),
        (replace(PLAIN, formula=Formula.POW2), BOX),
        (replace(PLAIN, formula=Formula.FP32), BOX),
        (replace(PLAIN, misc="a reason"), BOX),
        (replace(PLAIN, unused="a reason"), BOX),
        (PLAIN, replace(BOX, start=(0, 1))),
        (PLAIN, replace(BOX, shape=(4, 3))),
        (PLAIN, replace(BOX, at=Placement("t", 0, (4, 1)))),
        (PLAIN, replace(BOX, at=Placement("s", 1, (4, 1)))),
        (PLAIN, replace(BOX, at=Placement("s", 0, (5, 1)))),
        (PLAIN, replace(BOX, scale_at=Placement("s", 0, (1, 1)))),
    ],
)
def test_one_field_changes_the_digest(info: TensorInfo, box: Box) -> None:
    assert Manifest.of([info], {0: [box]}).digest() != Manifest.of([PLAIN], {0: [BOX]}).digest()


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": [1, None, "×"], "a": True}) == b'{"a":true,"b":[1,null,"\\u00d7"]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_a_placement_moves_by_its_strides() -> None:
    assert Placement("s", 7, (100, 3)).at((2, 5)) == Placement("s", 7 + 200 + 15, (100, 3))


def test_a_scalar_has_one_element() -> None:
    assert TensorInfo("bias", (), "float32").numel == 1
    assert TensorInfo("empty", (0, 4), "float32").numel == 0


def test_unknown_encodings_and_formulas_are_refused() -> None:
    for field, value in ((3, "tensorwise"), (4, "pow3")):
        data = PLAIN.to_json()
        data[field] = value
        with pytest.raises(ValueError, match=value):
            TensorInfo.from_json(data)


@pytest.mark.torch
def test_itemsize_is_torchs() -> None:
    import torch

    assert {n: getattr(torch, n).itemsize for n in ITEMSIZE} == ITEMSIZE
