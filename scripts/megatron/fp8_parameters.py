"""Train a Megatron model with FP8 parameters, refit a live vLLM after each step, compare with a fresh one.

    python -m scripts.megatron.fp8_parameters [--kinds dense,moe] [--steps 3]
    torchrun --nproc_per_node=4 -m scripts.megatron.fp8_parameters --engine-tp 2 --dp 2 [...]

Needs Hopper GPUs, Transformer Engine, Megatron-Bridge and vLLM: the first GPUs for the engine, then one
for each trainer rank, from the first again where there are no more. Trainer: blockwise FP8 parameters (with
NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 by `fp32`), with `--mixed` but for the first and the last layer; Adam in
the distributed optimizer with FP32 masters; with `--dp`, which leaves the all-gather of parameters to the next
forward; as many tensor (and expert) parallel ranks as `--dp` and `--pp` leave. Engine: dummy weights. After each
step: `refit`, log-probabilities; `export_checkpoint` of the same step, and the log-probabilities of a vLLM
that loads it in a process of its own. Then a NaN among the codes, which has to be refused, and a refit
from the masters.
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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import fp8sync
from fp8sync.export import export_checkpoint
from fp8sync.recipe import Encoding
from fp8sync.sources.megatron import MegatronSource
from fp8sync_kernels import quantize_blockwise
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LENGTH, BATCH = 128, 4


def main() -> None:
    """Run all kinds; exit 1 if a difference is not 0.0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="dense,moe")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--engine-tp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1, help="data-parallel size of the trainer")
    parser.add_argument("--pp", type=int, default=1, help="its pipeline-parallel size")
    parser.add_argument("--mixed", action="store_true", help="first and last layer in BF16")
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    torch.cuda.set_device((options.engine_tp + rank) % torch.cuda.device_count())
    started = os.environ.get("MASTER_PORT", os.getpid())
    folder = Path(tempfile.gettempdir()) / f"fp8_parameters-{started}"
    join(rank)
    refitted: dict[Path, torch.Tensor] = {}
    bad = 0
    for kind in options.kinds.split(","):
        found, served = run(kind, folder / kind, options)
        refitted |= found
        bad += served
    if rank == 0:
        bad += compare(refitted, options.engine_tp)
        shutil.rmtree(folder)
        sys.exit(1 if bad else 0)


def join(rank: int) -> None:
    """Join the trainer's ranks, one or those of torchrun."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True) if "RANK" not in os.environ else None
    size = int(os.environ.get("WORLD_SIZE", "1"))
    dist.init_process_group("nccl", rank=rank, world_size=size, store=store)


def start_engine(kind: str, folder: Path, options: argparse.Namespace) -> Any:
    """Write the model that the trainer begins with, and start an engine on dummy weights."""
    layers = 4 if options.mixed else 2
    hf = world.tiny_model(kind, 1, intermediate_size=512, num_hidden_layers=layers, **wider(kind))
    hf.save_pretrained(folder / "hf")
    ends = ("model.layers.0.", f"model.layers.{layers - 1}.") if options.mixed else ()
    plain = [n for n, weight in world.hf_tensors(hf) if n.startswith(ends) and weight.dim() == 2]
    engine = world.write_config(hf, folder / "engine", plain=plain)
    asked = {
        "load_format": "dummy",
        "multiprocess": True,
        "tensor_parallel_size": options.engine_tp,
    }
    return world.start_engine(engine, **asked)


def run(
    kind: str, folder: Path, options: argparse.Namespace
) -> tuple[dict[Path, torch.Tensor], bool]:
    """Train, refit and export.

    Returns:
        On rank 0, the live engine's log-probabilities by exported directory, and whether a NaN got through.
    """
    leads = dist.get_rank() == 0
    steps = options.steps
    llm = start_engine(kind, folder, options) if leads else None
    dist.barrier()
    bridge, chunks, optimizer = build(folder / "hf", kind, options)
    source = MegatronSource(chunks, bridge)
    held = source.manifest().tensors.values()  # of this rank
    pairs = sum(info.encoding is Encoding.BLOCKWISE for info in held)
    print(f"{kind}: {len(held)} tensors, {pairs} of them FP8 pairs of Transformer Engine")
    link = fp8sync.connect(source, llm)
    print(f"{kind}: {link.transport if leads else 'follows'}")
    found = {}
    for step in range(1, steps + 1):
        loss = train(chunks, optimizer, seed=step)
        incomplete = [pair["rowwise_data"].clone() for pair in fp8_pairs(chunks)]
        began = time.perf_counter()
        report = link.refit()
        seconds = time.perf_counter() - began
        pairs_now = [pair["rowwise_data"] for pair in fp8_pairs(chunks)]
        gathered = sum(not torch.equal(*both) for both in zip(incomplete, pairs_now, strict=True))
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
            f"the refit completed {gathered} of {len(pairs_now)} FP8 parameters; {of_masters(chunks)}",
            flush=True,
        )
    served = serves_nan(kind, link, chunks, llm)
    link.close()
    formula = formula_of(next(fp8_pairs(chunks)))
    source = MegatronSource(chunks, bridge, master=True)
    masters = {} if options.mixed else from_masters(source, formula, llm, folder)
    if leads and masters:
        moved = max_difference(masters.get(folder / "masters"), found[folder / f"step{steps}"])
        print(f"{kind}: refitted from the FP32 masters: moved by {moved}", flush=True)
    if leads:
        world.stop_engine(llm)
    return found | masters, served


def serves_nan(kind: str, link: Any, chunks: list, llm: Any) -> bool:
    """Refit with a NaN among the codes of a pair, and without it; whether the engine was moved by that."""
    code = next(fp8_pairs(chunks))["rowwise_data"].view(-1)[:1]
    kept = code.clone()
    before = None if llm is None else world.logprobs(llm)
    code.fill_(0x7F)
    try:
        link.refit()
        said = "not refused"
    except fp8sync.Fp8SyncError as error:
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
    code.copy_(kept)
    if llm is None:
        link.refit()
        return False
    with_nan = max_difference(world.logprobs(llm), before)
    link.refit()
    again = max_difference(world.logprobs(llm), before)
    print(
        f"{kind}: a NaN code: {said}; moved by {with_nan}, and by the next refit {again}",
        flush=True,
    )
    return bool(with_nan != 0.0 or again != 0.0)


def fp8_pairs(chunks: list) -> Iterator[dict[str, Any]]:
    """The metadata of all FP8 parameters of this rank."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if hasattr(parameter, "get_metadata"):
                yield parameter.get_metadata()


def formula_of(pair: dict[str, Any]) -> str:
    """The name of the formula of a pair's scales."""
    return "pow2" if pair["quantizer"].force_pow_2_scales else "fp32"


def from_masters(
    source: MegatronSource, formula: str, llm: Any, folder: Path
) -> dict[Path, torch.Tensor]:
    """Refit and export the masters as we quantize them; Transformer Engine rounds them to BF16 first."""
    recipe, told = f"blockwise-{formula}", {"config": folder / "hf", "progress": False}
    try:
        link = fp8sync.connect(source, llm, recipe)
        link.refit()
        link.close()
        made = export_checkpoint(source, folder / "masters", recipe, **told)
    except fp8sync.Fp8SyncError as error:
        print(f"not refitted from masters: {error}")
        return {}
    return {} if llm is None else {made.folder: world.logprobs(llm)}


def wider(kind: str) -> dict[str, int]:
    """What Transformer Engine's grouped matrix products need beyond vLLM's wants."""
    return {"moe_intermediate_size": 256} if kind == "moe" else {}


def build(checkpoint: Path, kind: str, options: argparse.Namespace) -> tuple[Any, list, Any]:
    """The bridge, the chunks in DDP with FP8 parameters, and the distributed optimizer."""
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    dp = options.dp
    ranks = dist.get_world_size() // dp // options.pp
    axes = {
        "tensor_model_parallel_size": ranks,
        "pipeline_model_parallel_size": options.pp,
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
        "first_last_layers_bf16": options.mixed,
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
    ddp = DistributedDataParallelConfig(
        fp8_param_gather=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=dp > 1,
        overlap_param_gather=dp > 1,
        bucket_size=200_000,  # several
        **divided,
    )
    chunks = provider.provide_distributed_model(ddp_config=ddp, wrap_with_ddp=True, bf16=True)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, fp8_recipe="blockwise", **divided
    )
    return bridge, chunks, get_megatron_optimizer(config, chunks)


def train(chunks: list, optimizer: Any, seed: int) -> float:
    """One step on random tokens, the same on all ranks but the data-parallel ones."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    own = parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(1000 * own + seed)
    tokens = torch.randint(256, (BATCH, LENGTH + 1), generator=generator).cuda()
    positions = torch.arange(LENGTH, device=tokens.device).expand(BATCH, LENGTH)

    def step(_: Any, chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        losses = chunk(inputs, positions, None, labels=labels)
        return losses, lambda found: (found.mean(), {"loss": found.detach().mean()})

    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    told = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(chunks),
        model=chunks,
        num_microbatches=1,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    finalize_model_grads(chunks)
    updated, norm, _ = optimizer.step()
    assert updated, f"no step was made, gradient norm {norm}"
    loss = told[0]["loss"].float() if told else torch.zeros((), device=tokens.device)
    dist.broadcast(loss, dist.get_world_size() - 1)  # which is of the last stage, and has it
    return loss.item()


def of_masters(chunks: list) -> str:
    """How many of the FP8 parameters are their masters, rounded to BF16 and quantized by their formula.

    Only those of which this rank has the whole master.
    """
    same = count = 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            master = getattr(parameter, "main_param", None)
            whole = master is not None and master.numel() == parameter.numel()
            if not whole or not hasattr(parameter, "get_metadata"):
                continue
            count += 1
            pair = parameter.get_metadata()
            rounded = master.detach().view(parameter.shape).bfloat16()
            expected = quantize_blockwise(rounded, formula_of(pair)).weight
            same += torch.equal(expected.view(torch.uint8), pair["rowwise_data"])
    return f"{same} of {count} FP8 parameters are their masters, rounded to BF16"


def compare(refitted: dict[Path, torch.Tensor], engine_tp: int) -> int:
    """Start a fresh vLLM on every directory, all at once; print and count the differences."""
    command = [sys.executable, "-m", "scripts.megatron.fresh"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(engine_tp))))
    gpus = visible.split(",")[:engine_tp]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
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
