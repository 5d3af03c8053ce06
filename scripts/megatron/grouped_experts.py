"""Hold Transformer Engine's one parameter for all experts to the experts one by one, on a GPU.

    NVTE_GROUPED_LINEAR_SINGLE_PARAM=1 NVTE_CUTEDSL_FUSED_GROUPED_MLP=1 python -m scripts.megatron.grouped_experts

A tiny Qwen3-MoE is loaded by Megatron-Bridge into a model with one parameter per expert, and from that into one
with `moe_single_grouped_weight`, by Transformer Engine's own renaming of a state_dict. DDP then moves the experts
into its buffer, and one in that buffer is changed. All are exported, as BF16 and as FP8, also from the masters.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from safetensors.torch import load_file

from fp8sync.export import export_checkpoint
from fp8sync.sources.megatron import MegatronSource
from scripts.megatron.fp8_parameters import join
from tests.engines import world


def main() -> None:
    """Exit 1 if a byte differs."""
    torch.cuda.set_device(0)
    join(0)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    folder = Path(tempfile.mkdtemp(prefix="grouped_experts-"))
    world.tiny_model("moe", 1, moe_intermediate_size=256).save_pretrained(folder / "hf")
    bridge, alone = build(folder / "hf", load=True)
    other, together = build(
        folder / "hf", moe_single_grouped_weight=True, use_transformer_engine_op_fuser=True
    )
    missing = together[0].module.load_state_dict(alone[0].module.state_dict(), strict=False)
    print(f"state_dict: {missing}")
    stacks = [p for c in together for p in c.parameters() if type(p).__name__ == "GroupedTensor"]
    told = ", ".join(f"{p.dtype} {list(p.shape)}" for p in stacks)
    print(f"{len(stacks)} parameters are GroupedTensor: {told}")
    bad = 0 if stacks else 1
    bad += differences(
        MegatronSource(alone, bridge), MegatronSource(together, other), folder, "loaded"
    )
    with torch.no_grad():  # in DDP's buffer, and in the parameter of one expert
        stacks[0].rowwise_data.view(stacks[0].shape)[3].mul_(1.5)
        fc1 = next(m for n, m in alone[0].named_modules() if n.endswith("0.mlp.experts.linear_fc1"))
        fc1.weight3.mul_(1.5)
    bad += differences(
        MegatronSource(alone, bridge), MegatronSource(together, other), folder, "changed"
    )
    for chunks in (alone, together):
        settings = OptimizerConfig(
            optimizer="adam", lr=1e-3, bf16=True, use_distributed_optimizer=True
        )
        get_megatron_optimizer(settings, chunks)
    masters = [MegatronSource(c, b, master=True) for c, b in ((alone, bridge), (together, other))]
    bad += differences(*masters, folder, "masters")
    shutil.rmtree(folder)
    sys.exit(1 if bad else 0)


def build(checkpoint: Path, *, load: bool = False, **changes: Any) -> tuple[Any, list[Any]]:
    """A bridge, and a model in DDP."""
    bridge = AutoBridge.from_hf_pretrained(str(checkpoint))
    provider = bridge.to_megatron_provider(load_weights=load)
    settings = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    settings |= {"gradient_accumulation_fusion": False, "moe_grouped_gemm": True, **changes}
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    return bridge, provider.provide_distributed_model(ddp_config=ddp, wrap_with_ddp=True, bf16=True)


def differences(alone: MegatronSource, together: MegatronSource, folder: Path, what: str) -> int:
    """Export both, as BF16 and as FP8; print and count tensors that differ."""
    bad = 0
    for recipe in ("bf16", "blockwise-pow2"):
        found = []
        for name, source in (("alone", alone), ("together", together)):
            place = folder / what / recipe / name
            export_checkpoint(source, place, recipe, config=folder / "hf", progress=False)
            tensors: dict[str, torch.Tensor] = {}
            for path in place.glob("*.safetensors"):
                tensors |= load_file(path)
            found.append(tensors)
        a, b = found
        differ = sorted(a.keys() ^ b.keys())
        differ += [n for n in a.keys() & b.keys() if not _same(a[n], b[n])]
        size = sum(t.nbytes for t in a.values())
        print(
            f"{what}, {recipe}: {len(a)} tensors, {size} bytes; {len(differ)} differ {differ[:3]}"
        )
        bad += len(differ)
    return bad


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


if __name__ == "__main__":
    main()
