"""What is asked of every layout of every model; each check returns its faults, one line each."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fp8sync.errors import Fp8SyncError
from fp8sync.export import export_checkpoint
from fp8sync.layouts import EngineLayout, from_config, manifest
from fp8sync.manifest import Manifest
from fp8sync.plan import MISC, build_plan
from fp8sync.plan.coverage import check_tiling
from fp8sync.recipe import Formula
from fp8sync.sources import LiveSource
from fp8sync.sources.megatron import MegatronSource
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise
from tests.layouts import wire
from tests.megatron import cpu, pairs
from tests.megatron.transfer import SCALES, assemble, carry_out, destination, invite, transfer
from tests.megatron.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LINEAR = re.compile(r"_proj(_with_mqa|_qkvz)?\.weight$")


def check_layout(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Refit a model of this layout, as BF16 and as FP8 by both formulas."""
    return refitted(checkpoint, *load(checkpoint, axes))


def refitted(checkpoint: Path, bridge: Any, chunks: list) -> list[str]:
    with Watch(p for chunk in chunks for p in chunk.parameters()) as watch:
        source = MegatronSource(chunks, bridge)
        names_gathered = watch.collectives
        own = source.manifest()
    faults = list(watch.faults)
    if watch.collectives != names_gathered:
        faults.append(f"manifest() ran {watch.collectives - names_gathered} collectives")
    merged = gather(own)
    check_tiling(merged)
    made = LiveSource(lambda: source)
    made.prepare()
    made.check(merged)
    live = source.storages()
    expected = reference(checkpoint)
    faults += same_tensors(merged, expected)
    arrived = transfer(merged, destination(merged, {}), live)
    faults += differences(arrived, expected)
    for formula in Formula:
        formulas = {name: formula for name in merged.tensors if LINEAR.search(name)}
        arrived = transfer(merged, destination(merged, formulas), live)
        faults += differences(arrived, as_quantized(expected, formulas))
    return faults


ENGINES = {
    "qwen3": [EngineLayout(), EngineLayout(tp=2), EngineLayout(tp=4), EngineLayout(tp=2, pp=2)],
    "qwen3-moe": [
        EngineLayout(),
        EngineLayout(tp=2),
        EngineLayout(tp=2, expert_parallel=True),
        EngineLayout(tp=2, dp=2, expert_parallel=True),
    ],
}
ENGINES |= dict.fromkeys(("qwen3-4layers", "qwen3-tied", "llama", "qwen2"), ENGINES["qwen3"])
ENGINES["deepseek-v3"] = ENGINES["qwen3-moe"]


def check_engines(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Refit engines of several layouts: every byte of their staging memory, and no collective.

    Engines hold blockwise FP8, fused and cut as vLLM does; the layouts are those on paper.
    """
    return staged(checkpoint, *load(checkpoint, axes))


def staged(checkpoint: Path, bridge: Any, chunks: list) -> list[str]:
    source = MegatronSource(chunks, bridge)
    merged = gather(source.manifest())
    model = from_config(json.loads((checkpoint / "config.json").read_text()))
    whole = reference(checkpoint)
    faults = []
    for layout in ENGINES[checkpoint.name]:
        wanted = manifest(layout, model)
        plan = build_plan(merged, wanted)
        expected = wire.storages(wanted, wire.quantized(wanted, whole))
        staging = wire.storages(wanted, None)
        invited = invite(list(wanted.ranks))
        with Watch(p for chunk in chunks for p in chunk.parameters()) as watch:
            carry_out(invited, plan, merged, source.storages(), staging)
        faults += watch.names  # the link's own group sends and receives, and knows no gather
        if dist.get_rank() == 0:
            faults += [
                f"{layout}: engine rank {rank}, {name} differs"
                for rank, held in expected.items()
                for name, tensor in held.items()
                if not torch.equal(tensor.view(torch.uint8), staging[rank][name].view(torch.uint8))
            ]
        dist.barrier()
    return faults


def check_pairs(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """FP8 parameters by both formulas, mixed with BF16 ones: boxes show the pairs as they are, live."""
    faults = []
    for formula in Formula:
        bridge, chunks = load(checkpoint, axes)
        source, merged = _paired(chunks, bridge, formula)
        check_tiling(merged)
        expected = reference(checkpoint)
        formulas = _pairs(merged)
        faults += [f"{name}: not {formula}" for name, f in formulas.items() if f is not formula]
        if not formulas or formulas.keys() == merged.tensors.keys():
            faults.append(f"expected a mixed model, found {len(formulas)} pairs")
        faults += differences(assemble(merged, source.storages()), as_quantized(expected, formulas))
        # A step: new codes and new scales, in the same buffers or (as replace_raw_data) in others.
        for number, (_, parameter) in enumerate(pairs.linear_weights(chunks)):
            parameter.detach().mul_(1.5)
            codes, scale_inv = pairs.buffers(parameter.detach(), formula)
            if number % 2:
                parameter.metadata |= {"rowwise_data": codes, "rowwise_scale_inv": scale_inv}
            else:
                parameter.metadata["rowwise_data"].copy_(codes)
                parameter.metadata["rowwise_scale_inv"].copy_(scale_inv)
        moved = {n: t * 1.5 if n in formulas else t for n, t in expected.items()}
        faults += differences(assemble(merged, source.storages()), as_quantized(moved, formulas))
    return faults


def check_cut_pairs(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Shards, or heads, that are not made of whole blocks: each named, compared with its values, exported."""
    bridge, chunks = load(checkpoint, axes)
    for _, parameter in pairs.linear_weights(chunks):
        q = quantize_blockwise(parameter.detach(), "pow2")
        exact = dequantize_blockwise(q.weight, q.scale_inv, torch.bfloat16)
        parameter.detach().copy_(exact)  # 4 bits times a power of two
    source = MegatronSource(chunks, bridge)
    merged = gather(source.manifest())
    expected = transfer(merged, destination(merged, {}), source.storages())
    source, merged = _paired(chunks, bridge, Formula.POW2)
    arrived = transfer(merged, destination(merged, _pairs(merged)), source.storages())
    values = {n.removeprefix(MISC): t for n, t in arrived.items() if n.startswith(MISC)}
    faults = differences(values, {n: expected[n].float() for n in values})
    cut = {
        "qwen3-narrow": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
        "qwen3-head64": {"self_attn.k_proj", "self_attn.v_proj"},
    }[checkpoint.name]
    named = {f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in cut}
    planned = build_plan(merged, destination(merged, _pairs(merged))).tensors.values()
    reasons = {info.name: info.misc for info in planned if info.misc}
    if reasons.keys() != named:
        faults.append(f"expected {sorted(named)} by misc, found {sorted(reasons)}")
    if dist.get_rank() == 0 and values.keys() != named:
        faults.append(f"expected {sorted(named)} to arrive, found {sorted(values)}")
    faults += [f"{n}: {r}" for n, r in reasons.items() if "the values are quantized anew" not in r]
    faults += differences(exported(chunks, checkpoint, "bf16", bridge), expected)
    if dist.get_rank() == 0:  # which has what is expected
        expected = as_quantized(expected, _pairs(merged))
    return faults + differences(exported(source, checkpoint, "blockwise"), expected)


def exported(
    model: Any, checkpoint: Path, recipe: str, bridge: Any = None
) -> dict[str, torch.Tensor]:
    """The directory that the ranks write of it, read again; scales by the names of `transfer`."""
    folder = checkpoint.with_name(f"{checkpoint.name}-exported")
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    export_checkpoint(model, folder, recipe, bridge=bridge, config=checkpoint, progress=False)
    return {n.replace("_scale_inv", SCALES): t for n, t in reference(folder).items()}


def check_masters(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """FP32 masters, divided among the data-parallel ranks or not, quantized straight from where they lie."""
    return mastered(checkpoint, axes, lambda: load(checkpoint, axes))


def mastered(
    checkpoint: Path, axes: dict[str, int], made: Callable[[], tuple[Any, list]]
) -> list[str]:
    faults = []
    for distributed in (True, False):
        bridge, chunks = made()
        chunks, _ = cpu.with_optimizer(chunks, distributed=distributed)
        for chunk in chunks:
            for parameter in chunk.parameters():
                if parameter.main_param is not None:  # values that BF16 does not have
                    parameter.main_param.mul_(1 + 2**-12)
        source = MegatronSource(chunks, bridge, master=True)
        merged = gather(source.manifest())
        check_tiling(merged)
        expected = {n: t.float() * (1 + 2**-12) for n, t in reference(checkpoint).items()}
        faults += same_tensors(merged, expected)
        live = source.storages()
        faults += differences(transfer(merged, destination(merged, {}), live), expected)
        if not distributed or dist.get_world_size() == axes.get("tp", 1) * axes.get("pp", 1):
            formulas = {n: Formula.POW2 for n in merged.tensors if LINEAR.search(n)}
            arrived = transfer(merged, destination(merged, formulas), live)
            faults += differences(arrived, as_quantized(expected, formulas))
    return faults


def refused(said: str, act: Callable[[], object]) -> list[str]:
    """Nothing if `act` raises an error that says `said`."""
    try:
        act()
    except Fp8SyncError as error:
        return [] if said in str(error) else [f"not said: {said}: {error}"]
    return [f"expected an error that says: {said}"]


def check_watch(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """What watches the listing of boxes does see a gather: that of Megatron-Bridge's export."""
    bridge, chunks = load(checkpoint, axes)
    with Watch(p for chunk in chunks for p in chunk.parameters()) as watch:
        list(bridge.export_hf_weights(chunks, show_progress=False))
    seen = " ".join(watch.faults)
    return [f"not seen: {what}" for what in ("c10d.allgather_", "allocated") if what not in seen]


def check_config(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """A bridge made from a config alone, without a checkpoint, and a chunk alone give the same manifest."""
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    bridge, chunks = load(checkpoint, axes)
    alone = AutoBridge.from_hf_config(AutoConfig.from_pretrained(str(checkpoint)))
    (chunk,) = chunks
    ways = (chunks, bridge), (chunks, alone), (chunk, bridge)
    digests = {MegatronSource(*way).manifest().digest() for way in ways}
    return [] if len(digests) == 1 else ["the manifests differ"]


def check_mtp(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Layers that predict further tokens, in a model made from a config; transformers saves none."""
    from megatron.bridge import AutoBridge
    from megatron.core.models.gpt import gpt_layer_specs
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(checkpoint))
    config.num_nextn_predict_layers = 1
    bridge = AutoBridge.from_hf_config(config)
    spec = gpt_layer_specs.get_gpt_mtp_block_spec

    def local(*args: Any, **kwargs: Any) -> Any:
        return spec(*args, **{**kwargs, "use_transformer_engine": False})

    with patch.object(gpt_layer_specs, "get_gpt_mtp_block_spec", local):
        chunks = cpu.build_chunks(bridge, axes, load=False)
    source = MegatronSource(chunks, bridge)
    merged = gather(source.manifest())
    check_tiling(merged)
    after = f"model.layers.{config.num_hidden_layers}."
    found = {n.removeprefix(after) for n in merged.tensors if n.startswith(after)}
    own = {f"{part}.weight" for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm")}
    layer = {n.removeprefix("model.layers.1.") for n in reference(checkpoint) if ".layers.1." in n}
    faults = [f"not listed: {n}" for n in sorted((own | layer) - found)]
    faults += [f"unknown: {n}" for n in sorted(found - own - layer)]
    embeddings = [n for n in merged.tensors if "embed" in n]
    return faults if embeddings == ["model.embed_tokens.weight"] else [*faults, f"{embeddings}"]


def check_export(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """The pairs that boxes show are those that Megatron-Bridge's own FP8 export gathers."""
    bridge, chunks = load(checkpoint, axes)
    source, merged = _paired(chunks, bridge, Formula.POW2)
    shown = assemble(merged, source.storages())
    tasks = bridge._model_bridge.build_export_fp8_tasks(bridge.hf_pretrained, chunks)
    as_bytes = [  # gloo carries no float8
        replace(task, param_weight=task.param_weight.view(torch.uint8))
        if task.param_weight is not None and task.param_weight.element_size() == 1
        else task
        for task in tasks
    ]
    exported = bridge.export_hf_weights(chunks, show_progress=False, conversion_tasks=as_bytes)
    expected = {}
    for name, tensor in exported:
        named = name.replace("_scale_inv", SCALES)
        expected[named] = (
            tensor.view(torch.float8_e4m3fn) if tensor.dtype is torch.uint8 else tensor
        )
    return differences(shown, expected)


def _paired(chunks: list, bridge: Any, formula: Formula) -> tuple[MegatronSource, Manifest]:
    pairs.quantize_in_place(chunks, formula)
    source = MegatronSource(chunks, bridge)
    return source, gather(source.manifest())


def _pairs(merged: Manifest) -> dict[str, Formula]:
    return {name: info.formula for name, info in merged.tensors.items() if info.formula}


def load(checkpoint: Path, axes: dict[str, int], **changes: Any) -> tuple[Any, list]:
    """Return the bridge and this rank's chunks, with the checkpoint's weights."""
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(str(checkpoint))
    return bridge, cpu.build_chunks(bridge, axes, **changes)


def gather(own: Manifest) -> Manifest:
    """All ranks' manifests as one, through their JSON."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own.to_json())
    parts = [Manifest.from_json(data) for data in found]
    tensors = {name: info for part in parts for name, info in part.tensors.items()}
    ranks = {rank: boxes for part in parts for rank, boxes in part.ranks.items()}
    assert all(tensors[name] == info for part in parts for name, info in part.tensors.items())
    return Manifest.of(tensors.values(), ranks)


def reference(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, read without Megatron."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def differences(arrived: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Name every tensor whose bytes differ; nothing where nothing was to arrive."""
    if dist.get_rank():
        return []
    faults = [f"{name}: did not arrive" for name in expected if name not in arrived]
    for name, tensor in arrived.items():
        wanted = expected[name].to(tensor.dtype)
        if not torch.equal(tensor.view(torch.uint8), wanted.contiguous().view(torch.uint8)):
            faults.append(f"{name}: {int((tensor != wanted).sum())} of {tensor.numel()} differ")
    return faults


def same_tensors(merged: Manifest, expected: dict[str, torch.Tensor]) -> list[str]:
    found = {name: tuple(info.shape) for name, info in merged.tensors.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    return [
        f"{name}: expected {wanted.get(name)}, found {found.get(name)}"
        for name in sorted({**found, **wanted})
        if found.get(name) != wanted.get(name)
    ]


def as_quantized(
    tensors: dict[str, torch.Tensor], formulas: dict[str, Formula]
) -> dict[str, torch.Tensor]:
    made = dict(tensors)
    for name, formula in formulas.items():
        quantized = quantize_blockwise(tensors[name], formula.value)
        made[name], made[name + SCALES] = quantized.weight, quantized.scale_inv
    return made
