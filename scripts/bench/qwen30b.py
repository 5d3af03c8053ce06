"""The shapes of Qwen3-30B-A3B: an engine's folder and options, and trainers with random weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.manifest import Box, Manifest, Placement, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2048, 32, 4, 128
EXPERTS, EXPERT_ROWS, VOCABULARY = 128, 768, 151936


def write_folder(folder: Path, layers: int) -> None:
    """Write config.json of a blockwise FP8 model."""
    gates = [f"model.layers.{n}.mlp.gate" for n in range(layers)]
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "moe_intermediate_size": EXPERT_ROWS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", *gates],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


def options(folder: Path, backend: str, **changes: Any) -> dict[str, Any]:
    """Arguments of an engine on dummy weights, on GPU 0."""
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "load_format": "dummy",
        "kv_cache_memory_bytes": 2 << 30,
        "gpu_memory_utilization": 0.4,  # only compared with what is free at the start
        "weight_transfer_config": {"backend": backend},
        **changes,
    }


def checkpoint_tensors(source: RandomQwen) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of an FP8 checkpoint of the same shapes, zeros; equal shapes share memory."""
    shared: dict[tuple[object, ...], torch.Tensor] = {}

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        key = shape, dtype
        if key not in shared:
            shared[key] = torch.zeros(shape, dtype=dtype, device=source.device)
        return shared[key]

    for info in source.manifest().tensors.values():
        if not info.name.endswith("_proj.weight"):
            yield info.name, zeros(info.shape, torch.bfloat16)
            continue
        yield info.name, zeros(info.shape, torch.float8_e4m3fn)
        blocks = tuple(-(-n // 128) for n in info.shape)
        yield info.name + "_scale_inv", zeros(blocks, torch.float32)


class RandomQwen:
    """A trainer with random BF16 weights; experts stacked per layer."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._storages: dict[str, torch.Tensor] = {}
        self._tensors: list[TensorInfo] = []
        self._boxes: list[Box] = []
        self.device = device
        self._whole("model.embed_tokens.weight", VOCABULARY, HIDDEN)
        for number in range(layers):
            self._layer(f"model.layers.{number}")
        self._whole("model.norm.weight", HIDDEN)
        self._whole("lm_head.weight", VOCABULARY, HIDDEN)

    def manifest(self) -> Manifest:
        """Return all tensors, on rank 0."""
        return Manifest.of(self._tensors, {0: self._boxes})

    def storages(self) -> dict[str, torch.Tensor]:
        """Return the weights."""
        return self._storages

    def _layer(self, layer: str) -> None:
        self._whole(f"{layer}.input_layernorm.weight", HIDDEN)
        self._whole(f"{layer}.post_attention_layernorm.weight", HIDDEN)
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            self._whole(f"{layer}.self_attn.{name}_proj.weight", rows * HEAD_DIM, HIDDEN)
        self._whole(f"{layer}.self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_DIM)
        self._whole(f"{layer}.self_attn.q_norm.weight", HEAD_DIM)
        self._whole(f"{layer}.self_attn.k_norm.weight", HEAD_DIM)
        self._whole(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
        for part, shape in (
            ("gate_proj", (EXPERT_ROWS, HIDDEN)),
            ("up_proj", (EXPERT_ROWS, HIDDEN)),
            ("down_proj", (HIDDEN, EXPERT_ROWS)),
        ):
            stack = f"{layer}.mlp.experts.{part}"
            self._storages[stack] = self._random(EXPERTS, *shape)
            for expert in range(EXPERTS):
                at = Placement(stack, expert * shape[0] * shape[1], (shape[1], 1))
                self._list(f"{layer}.mlp.experts.{expert}.{part}.weight", shape, at)

    def _whole(self, name: str, *shape: int) -> None:
        self._storages[name] = self._random(*shape)
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
        self._list(name, shape, Placement(name, 0, strides))

    def _list(self, name: str, shape: tuple[int, ...], at: Placement) -> None:
        self._tensors.append(TensorInfo(name, shape, "bfloat16"))
        self._boxes.append(Box(name, (0,) * len(shape), shape, at))

    def _random(self, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return tensor.normal_(std=0.02)
