"""Recipes by name."""

from __future__ import annotations

import json

import pytest

from fp8sync import Recipe
from fp8sync.recipe import Formula


@pytest.mark.parametrize(
    ("name", "kept_pow2", "kept_fp32"),
    [
        ("blockwise", Formula.POW2, Formula.FP32),
        ("blockwise-pow2", Formula.POW2, Formula.POW2),
        ("blockwise-fp32", Formula.FP32, Formula.FP32),
    ],
)
def test_blockwise_asks_the_engine_and_the_others_force(name, kept_pow2, kept_fp32) -> None:
    recipe = Recipe(name)
    assert recipe.formula(Formula.POW2) is kept_pow2
    assert recipe.formula(Formula.FP32) is kept_fp32
    assert recipe.quantizes


def test_bf16_quantizes_nothing() -> None:
    assert not Recipe("bf16").quantizes
    with pytest.raises(ValueError, match="dequantize has no meaning"):
        Recipe("bf16", dequantize=True)


def test_an_unknown_name_lists_the_known_ones() -> None:
    known = "blockwise, blockwise-pow2, blockwise-fp32, bf16"
    with pytest.raises(ValueError, match=f"unknown recipe 'fp8'; known: {known}"):
        Recipe.of("fp8")


def test_of_takes_a_name_or_a_recipe() -> None:
    recipe = Recipe("blockwise-pow2", dequantize=True, unquantized=("a", "b.*"))
    assert Recipe.of(recipe) is recipe
    assert Recipe.of("bf16") == Recipe("bf16")


@pytest.mark.parametrize("name", ["blockwise", "blockwise-fp32", "bf16"])
def test_json_is_lossless(name: str) -> None:
    recipe = Recipe(name, unquantized=["lm_head"])
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert hash(again) == hash(recipe)


@pytest.mark.parametrize(
    ("tensor", "left"),
    [
        ("lm_head.weight", True),
        ("model.layers.0.mlp.gate.weight", True),
        ("model.layers.0.mlp.shared_expert_gate.weight", True),
        ("model.layers.61.eh_proj.weight", True),
        ("model.layers.61.shared_head.head.weight", True),
        ("model.layers.0.linear_attn.in_proj_ba.weight", True),
        ("model.layers.0.linear_attn.in_proj_qkvz.weight", False),
        ("model.layers.0.mlp.gate_proj.weight", False),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", False),
        ("model.layers.0.self_attn.q_proj.weight", False),
    ],
)
def test_patterns_are_of_module_names(tensor: str, left: bool) -> None:
    assert Recipe("blockwise").leaves_unquantized(tensor) is left
