"""A trainer's forward pass in the engine's arithmetic: what training on policy, to the bit, takes.

Transformers and vLLM add up the same products in different orders. Here a dense Qwen3 of the trainer runs
on the operations that vLLM runs on a processor, fused as it fuses them, without any engine: what is
left between both sides' log-probabilities is their weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_SIZE = 128
"""Tokens of a page of the KV cache; vLLM's default on processors."""

Weights = "Callable[[str], torch.Tensor]"


@torch.no_grad()
def log_probabilities(model: Any, weights: Callable[[str], torch.Tensor], row: list[int]) -> Any:
    """Log-probabilities of every next token.

    Args:
        model: a `Qwen3ForCausalLM` in BF16.
        weights: its parameters by name, as the policy is to use them.
        row: tokens.

    Returns:
        float32 [length - 1, vocabulary].
    """
    config, count = model.config, len(row)
    hidden, residual = weights("model.embed_tokens.weight")[torch.tensor(row)], None
    positions = torch.arange(count)
    cos_sin = _cos_sin(config).to(hidden.dtype)
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        hidden, residual = _norm(
            hidden, residual, weights(f"{layer}.input_layernorm.weight"), config
        )
        attention = f"{layer}.self_attn"
        qkv = _linear(hidden, *(weights(f"{attention}.{n}_proj.weight") for n in "qkv"))
        attended = _attention(qkv, positions, cos_sin, attention, weights, config)
        hidden = _linear(attended, weights(f"{attention}.o_proj.weight"))
        norm = weights(f"{layer}.post_attention_layernorm.weight")
        hidden, residual = _norm(hidden, residual, norm, config)
        both = _linear(hidden, *(weights(f"{layer}.mlp.{n}_proj.weight") for n in ("gate", "up")))
        gate, up = both.chunk(2, dim=-1)
        hidden = _linear(
            torch.nn.functional.silu(gate) * up, weights(f"{layer}.mlp.down_proj.weight")
        )
    hidden, _ = _norm(hidden, residual, weights("model.norm.weight"), config)
    logits = _linear(hidden, weights("lm_head.weight"))
    return logits[:-1].float().log_softmax(-1)


def _linear(x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    """A fused projection, by the oneDNN kernel that vLLM makes of it at load."""
    return ops.onednn_mm(ops.create_onednn_mm(torch.cat(parts).t(), 32), x, None)


def _norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of a sum that is not rounded before; the sum, rounded, goes on beside it."""
    total = x.float() if residual is None else x.float() + residual.float()
    scale = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + config.rms_norm_eps)
    return (total * scale).to(weight.dtype) * weight, total.to(x.dtype)


def _cos_sin(config: Any) -> torch.Tensor:
    width = config.head_dim
    base = config.rope_parameters["rope_theta"]
    frequencies = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float) / width)
    places = torch.arange(config.max_position_embeddings, dtype=torch.float)
    angles = torch.einsum("i,j -> ij", places, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _attention(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    name: str,
    weights: Callable[[str], torch.Tensor],
    config: Any,
) -> torch.Tensor:
    heads, groups, width = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    count = len(qkv)
    q, k, v = (
        part.view(count, -1, width)
        for part in qkv.split([heads * width, groups * width, groups * width], dim=-1)
    )
    q, _ = _norm(q, None, weights(f"{name}.q_norm.weight"), config)
    k, _ = _norm(k, None, weights(f"{name}.k_norm.weight"), config)
    ops.rotary_embedding(positions, q.view(count, -1), k.view(count, -1), width, cos_sin, True)
    isa = _get_attn_isa(qkv.dtype, BLOCK_SIZE, width)
    pages = -(-count // BLOCK_SIZE)
    cache = torch.zeros(pages, groups, 2 * BLOCK_SIZE, width, dtype=qkv.dtype)
    keys, values = cache.chunk(2, dim=2)
    starts, lengths = (
        torch.tensor([0, count], dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
    )
    ops.cpu_attn_reshape_and_cache(k, v, keys, values, positions, isa)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=width,
        seq_lens=lengths,
        dtype=qkv.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    found = torch.empty_like(q)
    ops.cpu_attention_with_kv_cache(
        query=q,
        key_cache=keys,
        value_cache=values,
        output=found,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=width**-0.5,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=torch.arange(pages, dtype=torch.int32).view(1, -1),
        softcap=0.0,
        scheduler_metadata=schedule,
        s_aux=None,
    )
    return found.view(count, -1)
