import json

import pytest

from scripts.demo.corpus import read_corpus
from scripts.demo.models import BLOCK, KINDS, build_model, make_config, write_engine_config
from scripts.demo.training import Trainer


@pytest.mark.parametrize("kind", KINDS)
def test_every_dimension_is_a_multiple_of_a_block(kind):
    for name, weight in build_model(kind, seed=0).named_parameters():
        sizes = weight.shape[:1] if weight.ndim == 1 else weight.shape[-2:]
        if not name.endswith("mlp.gate.weight"):
            assert [size for size in sizes if size % BLOCK] == [], name


def test_the_engine_config_keeps_head_and_routers_unquantized(tmp_path):
    write_engine_config(make_config("moe"), tmp_path, fp8=True)
    content = json.loads((tmp_path / "config.json").read_text())

    assert content["architectures"] == ["Qwen3MoeForCausalLM"]
    assert content["quantization_config"] == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    }


def test_a_bf16_engine_config_says_nothing_of_quantization(tmp_path):
    write_engine_config(make_config("dense"), tmp_path, fp8=False)

    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"'dense', 'moe'.*'sparse'"):
        make_config("sparse")


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_repeatable_and_moves_the_policy(kind):
    corpus = read_corpus()
    windows = corpus.evaluation_windows(2, 16)
    seen = []
    for _ in range(2):
        trainer = Trainer(build_model(kind, seed=3), corpus, seed=3)
        before = trainer.log_probabilities(windows)
        trainer.train(2, kind)
        seen.append(trainer.log_probabilities(windows))

    assert seen[0].shape == (2, 15, 256)
    assert seen[0].equal(seen[1])
    assert not seen[0].equal(before)
