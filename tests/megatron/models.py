"""Tiny Hugging Face models of every family, and their checkpoints as transformers saves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

BASE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
HEADS = {"head_dim": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
LATENT = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
DELTA = {
    "num_hidden_layers": 4,  # three of gated delta networks, one of attention
    "shared_expert_intermediate_size": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {
    "num_hidden_layers": 3,
    "layers_block_type": ["mamba", "attention", "mlp"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "ssm_state_size": 64,
    "use_mamba_kernels": False,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", HEADS),
    "qwen3-4layers": ("Qwen3", HEADS | {"num_hidden_layers": 4}),
    "qwen3-tied": ("Qwen3", HEADS | {"tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", HEADS | EXPERTS),
    "qwen3-vocab130": ("Qwen3", HEADS | {"vocab_size": 130}),
    "qwen3-narrow": ("Qwen3", HEADS | {"intermediate_size": 384}),
    "qwen3-head64": ("Qwen3", {"head_dim": 64}),
    "llama": ("Llama", HEADS),
    "qwen2": ("Qwen2", {"hidden_size": 512}),
    "deepseek-v3": ("DeepseekV3", LATENT),
    "qwen3-next": ("Qwen3Next", HEADS | EXPERTS | DELTA),
    "nemotron-h": ("NemotronH", HEADS | MAMBA),
    "gpt-oss": ("GptOss", HEADS | {"num_local_experts": 4, "intermediate_size": 256}),
}


def write_checkpoint(kind: str, folder: Path) -> Path:
    """Save a random BF16 model of `kind`; biases and norms are random as well."""
    import transformers

    family, changes = KINDS[kind]
    torch.manual_seed(len(kind))
    config = getattr(transformers, f"{family}Config")(**BASE | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + ("norm" in name))
    model.save_pretrained(folder)
    if (
        family == "NemotronH"
    ):  # NVIDIA's checkpoints, which the bridge knows, have another name here
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["backbone.embeddings.weight"] = tensors.pop("backbone.embedding.weight")
        save_file(tensors, path, {"format": "pt"})
    return folder
