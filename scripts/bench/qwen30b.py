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


def write_folder(folder: Path, layers: int, positions: int = 4096) -> None:
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
        "max_position_embeddings": positions,
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
    """One rank of a trainer with random BF16 weights: matrices are cut by rows, experts stacked per layer.

    Args:
        layers: of the model.
        device: the GPU.
        rank: of the trainer; rank 0 has the vectors.
        ranks: a divisor of the number of experts.
        offload: keep the weights in pinned memory of the host.
    """

    def __init__(
        self,
        layers: int,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        *,
        offload: bool = False,
    ) -> None:
        self._storages: dict[str, torch.Tensor] = {}
        self._tensors: list[TensorInfo] = []
        self._boxes: list[Box] = []
        self.device, self._rank, self._ranks, self._offload = device, rank, ranks, offload
        self._matrix("model.embed_tokens.weight", VOCABULARY, HIDDEN)
        for number in range(layers):
            self._layer(f"model.layers.{number}")
        self._vector("model.norm.weight", HIDDEN)
        self._matrix("lm_head.weight", VOCABULARY, HIDDEN)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's weights."""
        return sum(tensor.nbytes for tensor in self._storages.values())

    def manifest(self) -> Manifest:
        """Return all tensors, and this rank's boxes."""
        return Manifest.of(self._tensors, {self._rank: self._boxes})

    def storages(self) -> dict[str, torch.Tensor]:
        """Return the weights."""
        return self._storages

    def _layer(self, layer: str) -> None:
        self._vector(f"{layer}.input_layernorm.weight", HIDDEN)
        self._vector(f"{layer}.post_attention_layernorm.weight", HIDDEN)
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            self._matrix(f"{layer}.self_attn.{name}_proj.weight", rows * HEAD_DIM, HIDDEN)
        self._matrix(f"{layer}.self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_DIM)
        self._vector(f"{layer}.self_attn.q_norm.weight", HEAD_DIM)
        self._vector(f"{layer}.self_attn.k_norm.weight", HEAD_DIM)
        self._matrix(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
        own = range(EXPERTS)[self._rank :: self._ranks]
        for part, shape in (
            ("gate_proj", (EXPERT_ROWS, HIDDEN)),
            ("up_proj", (EXPERT_ROWS, HIDDEN)),
            ("down_proj", (HIDDEN, EXPERT_ROWS)),
        ):
            stack = f"{layer}.mlp.experts.{part}"
            self._storages[stack] = self._random(len(own), *shape)
            for expert in range(EXPERTS):
                name = f"{layer}.mlp.experts.{expert}.{part}.weight"
                self._tensors.append(TensorInfo(name, shape, "bfloat16"))
                if expert in own:
                    first = own.index(expert) * shape[0] * shape[1]
                    at = Placement(stack, first, (shape[1], 1))
                    self._boxes.append(Box(name, (0, 0), shape, at))

    def _matrix(self, name: str, rows: int, columns: int) -> None:
        self._tensors.append(TensorInfo(name, (rows, columns), "bfloat16"))
        # In whole blocks of 128 rows, as far as there are enough.
        step = -(-rows // (128 * self._ranks)) * 128
        first = min(self._rank * step, rows)
        own = min(step, rows - first)
        if own:
            self._storages[name] = self._random(own, columns)
            at = Placement(name, 0, (columns, 1))
            self._boxes.append(Box(name, (first, 0), (own, columns), at))

    def _vector(self, name: str, size: int) -> None:
        self._tensors.append(TensorInfo(name, (size,), "bfloat16"))
        if self._rank == 0:
            self._storages[name] = self._random(size)
            self._boxes.append(Box(name, (0,), (size,), Placement(name, 0, (1,))))

    def _random(self, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(std=0.02)
        if not self._offload:
            return tensor
        return torch.empty(shape, dtype=torch.bfloat16, pin_memory=True).copy_(tensor)
