"""Models at full size, by name."""

from __future__ import annotations

from fp8sync.layouts.models import ModelShape

__all__ = ["PRESETS"]

PRESETS = {
    "llama-3.1-8b": ModelShape(
        layers=32,
        hidden=4096,
        intermediate=14336,
        vocabulary=128256,
        heads=32,
        kv_heads=8,
        head_dim=128,
    ),
    "qwen3-30b-a3b": ModelShape(
        layers=48,
        hidden=2048,
        intermediate=6144,
        vocabulary=151936,
        heads=32,
        kv_heads=4,
        head_dim=128,
        qk_norm=True,
        experts=128,
        expert_intermediate=768,
    ),
    "deepseek-v3": ModelShape(
        layers=61,
        hidden=7168,
        intermediate=18432,
        vocabulary=129280,
        heads=128,
        kv_heads=128,
        head_dim=128,
        experts=256,
        expert_intermediate=2048,
        shared_intermediate=2048,
        dense_layers=3,
        correction_bias=True,
        q_lora_rank=1536,
        kv_lora_rank=512,
        rope_dim=64,
        value_dim=128,
    ),
}
"""Known models; `fp8sync plan --model` takes these names. Layers of multi-token prediction are left out."""
