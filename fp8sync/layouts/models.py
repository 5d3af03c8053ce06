"""What a model is made of: its HF tensors, with shapes, and the role each plays when it is split.

A description is built from the handful of numbers of a Hugging Face config; nothing is downloaded
and no weight is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["ModelShape", "Role", "TensorShape", "from_config"]


class Role(str, Enum):
    """How a tensor is split, and with which others it is fused."""

    REPLICATED = "replicated"
    VOCABULARY = "vocabulary"
    COLUMN = "column"
    ROW = "row"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    QUERY_DOWN = "query_down"
    KV_DOWN = "kv_down"


@dataclass(frozen=True, slots=True)
class TensorShape:
    """One HF tensor.

    Args:
        name: HF parameter name.
        shape: full shape.
        role: how it is split.
        layer: decoder layer; -1 for the embedding, the number of layers for what follows the last.
        expert: routed expert, or None.
        linear: whether an FP8 checkpoint quantizes it.
        dtype: of the trainer's and the plain engine's elements.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int
    expert: int | None = None
    linear: bool = True
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a Hugging Face config that decide which tensors there are.

    Multi-head latent attention where `kv_lora_rank` is set; experts where `experts` is. The first
    `dense_layers` layers of a model with experts are dense.
    """

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = False
    experts: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    dense_layers: int = 0
    correction_bias: bool = False
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0

    @cached_property
    def tensors(self) -> tuple[TensorShape, ...]:
        """Every HF tensor, in checkpoint order."""
        return tuple(self._tensors())

    def _tensors(self) -> Iterator[TensorShape]:
        table = self.vocabulary, self.hidden
        yield TensorShape("model.embed_tokens.weight", table, Role.VOCABULARY, -1, linear=False)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield _norm(prefix + "input_layernorm.weight", self.hidden, layer)
            attention = self._latent if self.kv_lora_rank else self._attention
            yield from attention(prefix + "self_attn.", layer)
            yield _norm(prefix + "post_attention_layernorm.weight", self.hidden, layer)
            if self.experts and layer >= self.dense_layers:
                yield from self._experts(prefix + "mlp.", layer)
            else:
                yield from self._mlp(prefix + "mlp.", layer, self.intermediate)
        yield _norm("model.norm.weight", self.hidden, self.layers)
        if not self.tied:
            yield TensorShape("lm_head.weight", table, Role.VOCABULARY, self.layers, linear=False)

    def _attention(self, prefix: str, layer: int) -> Iterator[TensorShape]:
        rows = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        for (short, heads), role in zip(
            rows.items(), (Role.QUERY, Role.KEY, Role.VALUE), strict=True
        ):
            shape = heads * self.head_dim, self.hidden
            yield TensorShape(f"{prefix}{short}_proj.weight", shape, role, layer)
            if self.qkv_bias:
                bias = f"{prefix}{short}_proj.bias"
                yield TensorShape(bias, shape[:1], role, layer, linear=False)
        shape = self.hidden, self.heads * self.head_dim
        yield TensorShape(prefix + "o_proj.weight", shape, Role.ROW, layer)
        if self.qk_norm:
            yield _norm(prefix + "q_norm.weight", self.head_dim, layer)
            yield _norm(prefix + "k_norm.weight", self.head_dim, layer)

    def _latent(self, prefix: str, layer: int) -> Iterator[TensorShape]:
        rows = self.heads * (self.head_dim + self.rope_dim)
        if self.q_lora_rank:
            down = self.q_lora_rank, self.hidden
            yield TensorShape(prefix + "q_a_proj.weight", down, Role.QUERY_DOWN, layer)
            yield _norm(prefix + "q_a_layernorm.weight", self.q_lora_rank, layer)
            up = rows, self.q_lora_rank
            yield TensorShape(prefix + "q_b_proj.weight", up, Role.COLUMN, layer)
        else:
            yield TensorShape(prefix + "q_proj.weight", (rows, self.hidden), Role.COLUMN, layer)
        down = self.kv_lora_rank + self.rope_dim, self.hidden
        yield TensorShape(prefix + "kv_a_proj_with_mqa.weight", down, Role.KV_DOWN, layer)
        yield _norm(prefix + "kv_a_layernorm.weight", self.kv_lora_rank, layer)
        up = self.heads * (self.head_dim + self.value_dim), self.kv_lora_rank
        yield TensorShape(prefix + "kv_b_proj.weight", up, Role.COLUMN, layer)
        out = self.hidden, self.heads * self.value_dim
        yield TensorShape(prefix + "o_proj.weight", out, Role.ROW, layer)

    def _experts(self, prefix: str, layer: int) -> Iterator[TensorShape]:
        router = self.experts, self.hidden
        yield TensorShape(prefix + "gate.weight", router, Role.REPLICATED, layer, linear=False)
        if self.correction_bias:
            name = prefix + "gate.e_score_correction_bias"
            yield TensorShape(
                name, (self.experts,), Role.REPLICATED, layer, linear=False, dtype="float32"
            )
        for expert in range(self.experts):
            name = f"{prefix}experts.{expert}."
            yield from self._mlp(name, layer, self.expert_intermediate, expert)
        if self.shared_intermediate:
            yield from self._mlp(prefix + "shared_experts.", layer, self.shared_intermediate)

    def _mlp(
        self, prefix: str, layer: int, width: int, expert: int | None = None
    ) -> Iterator[TensorShape]:
        for short, role in (("gate", Role.GATE), ("up", Role.UP)):
            name = f"{prefix}{short}_proj.weight"
            yield TensorShape(name, (width, self.hidden), role, layer, expert)
        name = prefix + "down_proj.weight"
        yield TensorShape(name, (self.hidden, width), Role.DOWN, layer, expert)


def _norm(name: str, size: int, layer: int) -> TensorShape:
    return TensorShape(name, (size,), Role.REPLICATED, layer, linear=False)


def from_config(config: Mapping[str, Any]) -> ModelShape:
    """Return the description of a model from its Hugging Face config (`config.json`).

    Dense Qwen2, Qwen3 and Llama, Qwen3-MoE and DeepSeek-V3 are known; what else is in the config is left
    alone, so a model of another kind would be described wrongly.

    Raises:
        ValueError: `model_type` is none of these.
    """
    kind = config.get("model_type")
    known = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3")
    if kind not in known:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(known)}")
    heads = config["num_attention_heads"]
    common = {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "tied": bool(config.get("tie_word_embeddings")),
    }
    if kind == "deepseek_v3":
        width = config["moe_intermediate_size"]
        return ModelShape(
            **(common | {"head_dim": config["qk_nope_head_dim"]}),
            experts=config["n_routed_experts"],
            expert_intermediate=width,
            shared_intermediate=width * config["n_shared_experts"],
            dense_layers=config["first_k_dense_replace"],
            correction_bias=True,
            q_lora_rank=config.get("q_lora_rank") or 0,
            kv_lora_rank=config["kv_lora_rank"],
            rope_dim=config["qk_rope_head_dim"],
            value_dim=config["v_head_dim"],
        )
    if kind == "qwen3_moe":
        return ModelShape(
            **common,
            qk_norm=True,
            experts=config.get("num_experts") or config["num_local_experts"],
            expert_intermediate=config["moe_intermediate_size"],
        )
    return ModelShape(**common, qk_norm=kind == "qwen3", qkv_bias=kind == "qwen2")
