"""The two byte-level Qwen3 models, and the engine's config.json for each.

Every dimension is a multiple of 128, so that a 128x128 block never crosses the edge of a tensor,
nor the seam of a merged one (QKV, gate and up).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 256
BLOCK = 128
MAX_LENGTH = 256
KINDS = ("dense", "moe")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "use_cache": False,
}


def make_config(kind: str) -> PretrainedConfig:
    """The configuration of one kind of model.

    Args:
        kind: "dense" or "moe".

    Raises:
        ValueError: another kind.
    """
    if kind == "dense":
        return Qwen3Config(architectures=["Qwen3ForCausalLM"], **_COMMON)
    if kind == "moe":
        return Qwen3MoeConfig(
            architectures=["Qwen3MoeForCausalLM"],
            moe_intermediate_size=128,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            **_COMMON,
        )
    raise ValueError(f"kind of model: expected one of {KINDS}, found {kind!r}")


def build_model(kind: str, seed: int) -> PreTrainedModel:
    """A BF16 model of this kind with seeded random weights."""
    torch.manual_seed(seed)
    architecture = {"dense": Qwen3ForCausalLM, "moe": Qwen3MoeForCausalLM}
    return architecture[kind](make_config(kind)).to(torch.bfloat16)


def quantization_config(config: PretrainedConfig) -> dict[str, Any]:
    """The blockwise-FP8 section of a config.json, in the form of the official FP8 checkpoints.

    The router stays in BF16: its rows are as many as the experts, far fewer than a block.
    """
    kept = ["lm_head"]
    if isinstance(config, Qwen3MoeConfig):
        kept += [f"model.layers.{layer}.mlp.gate" for layer in range(config.num_hidden_layers)]
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }


def write_engine_config(config: PretrainedConfig, directory: Path, *, fp8: bool) -> None:
    """Writes the config.json an engine starts from; it needs nothing else on dummy weights."""
    content = config.to_dict() | {"dtype": "bfloat16", "output_router_logits": False}
    if fp8:
        content["quantization_config"] = quantization_config(config)
    (directory / "config.json").write_text(json.dumps(content, indent=2))
