"""Tiny models for the matrix, trained for a minute: `tiny_models.py FOLDER [KIND...]` saves each under its kind.

Bytes of the standard library's sources are the tokens. Every dim is such that four engine workers
hold whole 128-blocks of each matrix.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

from scripts.demo.corpus import read_corpus
from scripts.demo.training import Trainer

STEPS = 60
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 512, "num_experts_per_tok": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Qwen3", {"intermediate_size": 512}),
    "gated-moe": ("Qwen3Moe", EXPERTS | {"num_experts": 8, "norm_topk_prob": True}),
    "hybrid": (
        "NemotronH",
        EXPERTS
        | {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "num_hidden_layers": None,
            "intermediate_size": 512,
            "n_routed_experts": 8,
            "moe_shared_expert_intermediate_size": 512,
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "n_groups": 4,
            "ssm_state_size": 128,
        },
    ),
    "mla": (
        "DeepseekV3",
        EXPERTS
        | {
            "intermediate_size": 512,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "num_nextn_predict_layers": 0,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "q_lora_rank": 256,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
}


def build(kind: str) -> transformers.PreTrainedModel:
    """A BF16 model of this kind with seeded random weights."""
    family, changes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON | changes)
    config.architectures = [f"{family}ForCausalLM"]
    return getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)


def main(folder: Path, kinds: list[str]) -> None:
    text = read_corpus()
    for kind in kinds or KINDS:
        if not (folder / kind / "model.safetensors").exists():
            trainer = Trainer(build(kind), text, 0)
            trainer.train(STEPS, f"{kind}: training")
            trainer.model.save_pretrained(folder / kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
