"""Train a Megatron model with FP8 parameters, refit a live vLLM after each step, compare with a fresh one.

    python -m scripts.megatron.fp8_parameters [--kinds dense,moe] [--steps 3]
    torchrun --nproc_per_node=2 -m scripts.megatron.fp8_parameters --engine-tp 2 [...]

Needs Hopper GPUs, Transformer Engine, Megatron-Bridge and vLLM: the first GPUs for the engine, then one
for each trainer rank. Trainer: blockwise FP8 parameters, Adam in the distributed optimizer with FP32
masters; as many tensor (and expert) parallel ranks as there are. Engine: dummy weights. After each step:
`refit`, log-probabilities; `export_checkpoint` of the same step, and the log-probabilities of a vLLM that
loads it in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fp8sync
from fp8sync.export import export_checkpoint
from fp8sync.recipe import Encoding
from fp8sync.sources.megatron import MegatronSource
from fp8sync_kernels import quantize_blockwise
from tests.engines import world
from tests.engines.two_ranks import without_torchrun

LENGTH, BATCH = 128, 4


def main() -> None:
    """Run all kinds; exit 1 if a difference is not 0.0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="dense,moe")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--engine-tp", type=int, default=1)
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    torch.cuda.set_device(options.engine_tp + rank)
    started = os.environ.get("MASTER_PORT", os.getpid())
    folder = Path(tempfile.gettempdir()) / f"fp8_parameters-{started}"
    join(rank)
    refitted: dict[Path, torch.Tensor] = {}
    for kind in options.kinds.split(","):
        refitted |= run(kind, options.steps, folder / kind, options.engine_tp)
    if rank == 0:
        bad = without_torchrun(lambda: compare(refitted, options.engine_tp))
        shutil.rmtree(folder)
        sys.exit(1 if bad else 0)


def join(rank: int) -> None:
    """Join the trainer's ranks, one or those of torchrun."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True) if "RANK" not in os.environ else None
    size = int(os.environ.get("WORLD_SIZE", "1"))
    dist.init_process_group("nccl", rank=rank, world_size=size, store=store)


def start_engine(kind: str, folder: Path, tp: int) -> Any:
    """Write the model that the trainer begins with, and start an engine on dummy weights."""
    hf = world.tiny_model(kind, 1, intermediate_size=512, **wider(kind))
    hf.save_pretrained(folder / "hf")
    config = world.write_config(hf, folder / "engine")
    options = {"load_format": "dummy", "multiprocess": True, "tensor_parallel_size": tp}
    return without_torchrun(lambda: world.start_engine(config, **options))


def run(kind: str, steps: int, folder: Path, engine_tp: int) -> dict[Path, torch.Tensor]:
    """Train, refit and export; on rank 0, the live engine's log-probabilities by exported directory."""
    leads = dist.get_rank() == 0
    llm = start_engine(kind, folder, engine_tp) if leads else None
    dist.barrier()
    bridge, chunks, optimizer = build(folder / "hf", kind)
    source = MegatronSource(chunks, bridge)
    held = source.manifest().tensors.values()  # of this rank
    pairs = sum(info.encoding is Encoding.BLOCKWISE for info in held)
    print(f"{kind}: {len(held)} tensors, {pairs} of them FP8 pairs of Transformer Engine")
    link = fp8sync.connect(source, llm)
    print(f"{kind}: {link.transport if leads else 'follows'}")
    found = {}
    for step in range(1, steps + 1):
        loss = train(chunks, optimizer, seed=step)
        began = time.perf_counter()
        report = link.refit()
        seconds = time.perf_counter() - began
        made = export_checkpoint(
            source, folder / f"step{step}", "blockwise", config=folder / "hf", progress=False
        )
        if not leads:
            continue
        found[made.folder] = world.logprobs(llm)
        before = found.get(folder / f"step{step - 1}", torch.zeros_like(found[made.folder]))
        moved = max_difference(found[made.folder], before)
        print(
            f"{kind} step {step}: loss {loss:.3f}, refit {seconds:.3f} s, {report.bytes_sent} bytes; "
            f"exported {made.tensors} tensors, {made.quantized} FP8; moved by {moved:.3f}; "
            f"{of_masters(chunks)}",
            flush=True,
        )
    link.close()
    if dist.get_world_size() > 1:
        if leads:
            world.stop_engine(llm)
        return found
    again = from_masters(MegatronSource(chunks, bridge, master=True), llm)
    moved = max_difference(again, found[folder / f"step{steps}"])
    print(f"{kind}: refitted from the FP32 masters instead: max |difference| {moved}", flush=True)
    world.stop_engine(llm)
    return found


def from_masters(source: MegatronSource, llm: Any) -> torch.Tensor | None:
    """Log-probabilities after the masters were quantized by us; Transformer Engine rounds them first."""
    try:
        link = fp8sync.connect(source, llm, "blockwise-pow2")
        link.refit()
        link.close()
    except fp8sync.Fp8SyncError as error:
        print(f"not refitted from masters: {error}")
        return None
    return world.logprobs(llm)


def wider(kind: str) -> dict[str, int]:
    """What Transformer Engine's grouped matrix products need beyond vLLM's wants."""
    return {"moe_intermediate_size": 256} if kind == "moe" else {}


def build(checkpoint: Path, kind: str) -> tuple[Any, list, Any]:
    """The bridge, the chunks in DDP with FP8 parameters, and the distributed optimizer."""
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ranks = dist.get_world_size()
    axes = {
        "tensor_model_parallel_size": ranks,
        "expert_model_parallel_size": ranks if kind == "moe" else 1,
        "expert_tensor_parallel_size": 1,
    }
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**axes)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    bridge = AutoBridge.from_hf_pretrained(str(checkpoint))
    provider = bridge.to_megatron_provider(load_weights=True)
    settings = axes | {
        "sequence_parallel": ranks > 1,
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
        "fp8_param": True,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "gradient_accumulation_fusion": False,
        "moe_router_padding_for_quantization": True,
        "moe_token_dispatcher_type": "alltoall",
    }
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    divided = {"use_distributed_optimizer": True}
    ddp = DistributedDataParallelConfig(fp8_param_gather=True, grad_reduce_in_fp32=True, **divided)
    chunks = provider.provide_distributed_model(ddp_config=ddp, wrap_with_ddp=True, bf16=True)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, fp8_recipe="blockwise", **divided
    )
    return bridge, chunks, get_megatron_optimizer(config, chunks)


def train(chunks: list, optimizer: Any, seed: int) -> float:
    """One step on random tokens, the same on all ranks."""
    from megatron.core.distributed import finalize_model_grads

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (BATCH, LENGTH + 1), generator=generator).cuda()
    positions = torch.arange(LENGTH, device="cuda").expand(BATCH, LENGTH)
    (chunk,) = chunks
    chunk.train()
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss = chunk(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    loss.mean().backward()
    finalize_model_grads(chunks)
    updated, norm, _ = optimizer.step()
    assert updated, f"no step was made, gradient norm {norm}"
    return loss.mean().item()


def of_masters(chunks: list) -> str:
    """How many of the FP8 parameters are their masters, rounded to BF16 and quantized by `pow2`."""
    same = count = 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            master = getattr(parameter, "main_param", None)
            if master is None or not hasattr(parameter, "get_metadata"):
                continue
            count += 1
            codes = parameter.get_metadata()["rowwise_data"]
            rounded = master.detach().view(parameter.shape).bfloat16()
            expected = quantize_blockwise(rounded, "pow2").weight
            same += torch.equal(expected.view(torch.uint8), codes)
    return f"{same} of {count} FP8 parameters are their masters, rounded to BF16, by pow2"


def compare(refitted: dict[Path, torch.Tensor], engine_tp: int) -> int:
    """Start a fresh vLLM on every directory, all at once; print and count the differences."""
    command = [sys.executable, "-m", "scripts.megatron.fresh"]
    gpus = ",".join(str(n) for n in range(engine_tp))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    given = [[*command, str(folder), str(engine_tp)] for folder in refitted]
    running = [subprocess.Popen(one, env=env) for one in given]
    bad = 0
    for process, (folder, live) in zip(running, refitted.items(), strict=True):
        ended = process.wait(150)
        fresh = torch.load(folder / "logprobs.pt", weights_only=True) if ended == 0 else None
        difference = max_difference(fresh, live)
        bad += difference != 0.0
        name = f"{folder.parent.name} {folder.name}"
        print(f"{name}: refitted against a fresh vLLM on its export: max |difference| {difference}")
    return bad


def max_difference(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """Largest difference; NaN if there is nothing to compare."""
    return float("nan") if a is None or b is None else (a - b).abs().max().item()


if __name__ == "__main__":
    main()
