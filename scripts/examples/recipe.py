"""One training recipe, three trainers: Hugging Face, FSDP2 or Megatron-Core, switched by one option.

    python   -m scripts.examples.recipe --trainer hf       --model DIR --engine http://127.0.0.1:8000
    torchrun --nproc_per_node=4 -m scripts.examples.recipe --trainer fsdp2    --model DIR --engine ...
    torchrun --nproc_per_node=4 -m scripts.examples.recipe --trainer megatron --model DIR --engine ...

The engine is a `vllm serve` (docs/integration.md). After each step it has the new weights. Data is random
tokens, the same on every rank: this shows how a trainer is built and refitted, not how a model learns.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

import fp8sync

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, LENGTH = 2, 128


class Trainer(NamedTuple):
    """What differs: the model as `fp8sync.refit` takes it, and one step on tokens [BATCH, LENGTH + 1]."""

    model: Any
    step: Callable[[torch.Tensor], float]
    bridge: Any = None


def hf(folder: str, rate: float) -> Trainer:
    """A plain Hugging Face model on one rank."""
    return _of_module(_load(folder), rate)


def fsdp2(folder: str, rate: float) -> Trainer:
    """The same, every layer sharded over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _load(folder)
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return _of_module(fully_shard(model, mesh=mesh), rate)


def megatron(folder: str, rate: float) -> Trainer:
    """Megatron-Core through Megatron-Bridge, tensor-parallel over all ranks."""
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size, provider.sequence_parallel = ranks, ranks > 1
    provider.finalize()
    parts = {"use_distributed_optimizer": True}
    chunks = provider.provide_distributed_model(DistributedDataParallelConfig(**parts))
    settings = OptimizerConfig(optimizer="adam", lr=rate, bf16=True, **parts)
    optimizer = get_megatron_optimizer(settings, chunks)

    def step(tokens: torch.Tensor) -> float:
        (chunk,) = chunks
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        places = torch.arange(LENGTH, device=DEVICE).expand(BATCH, LENGTH)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = chunk(inputs, places, None, labels=labels).mean()
        loss.backward()
        finalize_model_grads(chunks)
        optimizer.step()
        return loss.item()

    return Trainer(chunks, step, bridge)


TRAINERS = {"hf": hf, "fsdp2": fsdp2, "megatron": megatron}


def main() -> None:
    """Train, and refit the engine after each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", choices=TRAINERS, required=True)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--engine", required=True, help="URL of a vllm serve")
    parser.add_argument("--recipe", default="blockwise")
    parser.add_argument("--dequantize", action="store_true", help="the engine holds no FP8")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--save", help="write the last step's weights here, as the engine has them")
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    recipe = fp8sync.Recipe(options.recipe, dequantize=options.dequantize)
    engine = options.engine if rank == 0 else None

    trainer = TRAINERS[options.trainer](options.model, options.rate)
    for number in range(options.steps):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(256, (BATCH, LENGTH + 1), generator=generator).to(DEVICE)
        loss = trainer.step(tokens)
        report = fp8sync.refit(trainer.model, engine, recipe, bridge=trainer.bridge)
        if rank == 0:
            print(f"step {number}: loss {loss:.4f}, version {report.version}", flush=True)
    if options.save:
        from fp8sync.export import export_checkpoint

        told = {"bridge": trainer.bridge, "config": options.model, "progress": False}
        export_checkpoint(trainer.model, options.save, recipe, **told)


def _load(folder: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)


def _of_module(model: torch.nn.Module, rate: float) -> Trainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def step(tokens: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return Trainer(model, step)


if __name__ == "__main__":
    main()
