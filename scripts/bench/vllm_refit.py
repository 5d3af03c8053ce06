"""Refit a live vLLM with the shapes of Qwen3-30B-A3B, full size, from one GPU to another.

    python scripts/bench/vllm_refit.py [--layers 48] [--refits 10] [--out FILE.jsonl]

Needs two GPUs: vLLM runs on GPU 0 in its own process (load_format="dummy"), the trainer's random BF16
weights lie on GPU 1. Prints one line per refit and the medians, with the wire's bandwidth as measured by
a peer copy of 1 GiB in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fp8sync
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2048, 32, 4, 128
EXPERTS, EXPERT_ROWS, VOCABULARY = 128, 768, 151936


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--refits", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    wire = peer_bandwidth()
    print(f"peer copy of 1 GiB, GPU 1 -> GPU 0: {wire / 1e9:.0f} GB/s")
    with tempfile.TemporaryDirectory() as folder:
        llm = start_engine(Path(folder), options.layers)
        source = RandomQwen(options.layers, torch.device("cuda:1"))
        torch.cuda.set_device(1)
        began = time.perf_counter()
        link = fp8sync.connect(source, llm, "blockwise-pow2")
        print(f"connect: {time.perf_counter() - began:.2f} s; {link.transport}")
        print(link.plan.explain().splitlines()[0])
        rows = [refit(link) for _ in range(options.refits)]
    keys = ("total", "quantize", "verify", "prepare", "commit", "pause")
    medians = {key: statistics.median(row[key] for row in rows[1:]) for key in keys}
    floor = rows[0]["bytes"] / wire
    print("median of all but the first: " + ", ".join(f"{k} {v:.4f} s" for k, v in medians.items()))
    print(f"wire floor {floor:.4f} s; total / floor = {medians['total'] / floor:.2f}")
    if options.out:
        record = {"wire_bytes_per_s": wire, "layers": options.layers, "rows": rows}
        options.out.write_text(json.dumps(record) + "\n")


def refit(link: Any) -> dict[str, float]:
    """One refit and its line."""
    began = time.perf_counter()
    report = link.refit()
    total = time.perf_counter() - began
    row = {**report.seconds, "pause": report.pause_s, "bytes": report.bytes_sent, "total": total}
    print(" ".join(f"{key}={value:.4f}" for key, value in row.items()), flush=True)
    return row


def peer_bandwidth() -> float:
    """Bytes per second of a large copy from GPU 1 to GPU 0 (median of 10)."""
    there = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    here = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:1")
    seconds = []
    for _ in range(12):
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        began = time.perf_counter()
        there.copy_(here)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        seconds.append(time.perf_counter() - began)
    return (1 << 30) / statistics.median(seconds[2:])


def start_engine(folder: Path, layers: int) -> Any:
    """A vLLM on dummy weights, blockwise FP8."""
    from vllm import LLM

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
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=32,
        load_format="dummy",
        kv_cache_memory_bytes=2 << 30,
        weight_transfer_config={"backend": "fp8sync"},
    )


class RandomQwen:
    """A trainer with random BF16 weights; experts stacked per layer."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._storages: dict[str, torch.Tensor] = {}
        self._tensors: list[TensorInfo] = []
        self._boxes: list[Box] = []
        self._device = device
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
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        return tensor.normal_(std=0.02)


if __name__ == "__main__":
    main()
