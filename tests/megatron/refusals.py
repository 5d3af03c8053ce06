"""Bad input, and the words that have to be said about it; each check returns what was not said."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fp8sync.errors import Fp8SyncError
from fp8sync.export import export_checkpoint
from fp8sync.manifest import Manifest
from fp8sync.plan.coverage import check_tiling
from fp8sync.recipe import Formula
from fp8sync.sources import as_source
from fp8sync.sources.megatron import DistributedCheckpointSource, MegatronSource
from tests.megatron import cpu, pairs
from tests.megatron.checks import gather, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYER = r"decoder\.layers\.{}\.\S*{} \(.*\): {}"


def check_bad_pairs(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Everything that can be wrong with a pair, all told in one error, tensor by tensor."""
    bridge, chunks = load(checkpoint, axes)
    quantizer = {"block_len": 128, "force_pow_2_scales": True}
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("0.self_attention.linear_qkv", {"rowwise_data": None, "columnwise_data": 1}, "expected rowwise_data, found columnwise only"),
        ("0.self_attention.linear_proj", {"rowwise_scale_inv": None}, "expected rowwise_scale_inv, found none"),
        ("0.mlp.linear_fc1", {"is_2D_scaled": False}, "found scales of 1x128 rows"),
        ("0.mlp.linear_fc2", {"fp8_dtype": pairs.DType.kFloat8E5M2}, "expected E4M3 codes, found kFloat8E5M2"),
        ("1.self_attention.linear_qkv", {"quantizer": None}, "expected block_len 128, found None"),
        ("1.self_attention.linear_proj", {"quantizer": SimpleNamespace(**quantizer | {"block_len": 64})}, "expected block_len 128, found 64"),
        ("1.mlp.linear_fc1", {"rowwise_scale_inv": torch.zeros(1, 4)}, r"expected scale_inv torch\.float32 \[8, 2\], or .* padded to fours, found torch\.float32 \[1, 4\]"),
    ]  # fmt: skip
    parameters = {n: p for chunk in chunks for n, p in chunk.named_parameters()}
    expected = []
    for name, metadata, told in wrong:
        whole = next(n for n in parameters if n.endswith(f"decoder.layers.{name}.weight"))
        pairs.make_pair(parameters[whole], Formula.POW2, **metadata)
        expected.append(rf"rank \d: decoder\.layers\.{re.escape(name)}\.weight \(.*\): .*{told}")
    last = next(p for n, p in parameters.items() if n.endswith("1.mlp.linear_fc2.weight"))
    last.get_metadata = lambda: {"rowwise_scale_inv": 1}
    expected.append(r"layers\.1\.mlp\.linear_fc2\.weight \(.*\): expected blockwise FP8")
    return unsaid(expected, lambda: MegatronSource(chunks, bridge).manifest())


def check_wrong_bridge(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """The bridge of Llama on a Qwen3 model, whose heads have norms that Llama does not know."""
    from megatron.bridge import AutoBridge

    _, chunks = load(checkpoint, axes, qk_layernorm=True, load=False)
    bridge = AutoBridge.from_hf_pretrained(str(checkpoint))
    expected = [
        rf"layers\.{n}\.self_attention\.{kind}_layernorm\.weight: expected a mapping of LlamaBridge"
        for n in (0, 1)
        for kind in "qk"
    ]
    return unsaid(expected, lambda: MegatronSource(chunks, bridge).manifest())


def check_other_experts(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Experts in one tensor, as older Megatron-Core held them, and quantized by a recipe that we do not read."""
    bridge, chunks = load(checkpoint, axes)
    experts = next(m for n, m in chunks[0].named_modules() if n.endswith("layers.0.mlp.experts"))
    for name in ("weight1", "weight2"):
        experts.register_parameter(name, torch.nn.Parameter(torch.zeros(2, 512, 256)))
    experts.linear_fc1 = torch.nn.Module()
    experts.linear_fc1.weight = torch.nn.Parameter(torch.zeros(2, 512, 256))
    experts.linear_fc1.weight.quantizer = type("MXFP8Quantizer", (), {})()
    experts.linear_fc1.single_grouped_weight = True
    expected = [
        rf"decoder\.layers\.0\.mlp\.experts\.{name}: expected a mapping of Qwen3MoEBridge .* found none"
        for name in ("weight1", "weight2")
    ]
    expected += [
        rf"experts\.linear_fc1\.weight{n} .* expected plain elements, found MXFP8Quantizer's"
        for n in (0, 1)
    ]
    return unsaid(expected, lambda: MegatronSource(chunks, bridge).manifest())


def check_other_forms(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Weights that are not what their mapping takes them for, and chunks that are none, or without a bridge."""
    from megatron.bridge.models.conversion.utils import unwrap_model

    bridge, chunks = load(checkpoint, axes)
    (model,) = unwrap_model(chunks)
    model.config.layernorm_zero_centered_gamma = True
    owner = model.decoder.layers[0].mlp.linear_fc2
    # As GTPShardedParam of megatron/core/tensor_parallel/generalized_tensor_parallelism.py.
    owner.weight = type("GTPShardedParam", (torch.nn.Parameter,), {})(owner.weight.detach())
    adapted = model.decoder.layers[1].self_attention.linear_proj
    adapted.adapter = torch.nn.ModuleDict({"linear_in": torch.nn.Linear(2, 2, bias=False)})
    expected = [
        r"layers\.1\.self_attention\.linear_proj\.adapter\.linear_in\.weight: a LoRA adapter; merge it",
        r"norms hold their weights minus one \(layernorm_zero_centered_gamma\), expected Qwen3Bridge",
        LAYER.format(
            0, "linear_fc2.weight", "expected a plain or FP8 tensor, found GTPShardedParam"
        ),
    ]
    faults = unsaid(expected, lambda: MegatronSource(chunks, bridge).manifest())
    for given, found in (([], "none"), (checkpoint, "PosixPath"), ([None], "NoneType")):
        said = [f"expected Megatron-Core model chunks, found {found}$"]
        faults += unsaid(said, lambda given=given: MegatronSource(given, bridge), whole=True)
    said = ["is a Megatron-Core model: expected its bridge="]
    return faults + unsaid(said, lambda: as_source(chunks[0]), whole=True)


def check_no_master(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Masters before there is an optimizer, and of a distributed one whose ranges are out of sight."""
    bridge, chunks = load(checkpoint, axes)
    expected = [LAYER.format(0, "linear_fc2.weight", "expected an FP32 master .* found none")]
    faults = unsaid(expected, lambda: MegatronSource(chunks, bridge, master=True).manifest())
    cpu.with_optimizer(chunks, distributed=True)
    expected = [LAYER.format(1, "linear_qkv.weight", "its master is divided .* as DDP wraps them")]
    return faults + unsaid(expected, lambda: MegatronSource(chunks, bridge, master=True).manifest())


def check_nan_master(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """A master that is NaN on one rank: all ranks name the tensor, and no file is left."""
    bridge, chunks = load(checkpoint, axes)
    chunks, _ = cpu.with_optimizer(chunks, distributed=True)
    source = MegatronSource(chunks, bridge, master=True)
    if dist.get_rank() == 1:
        names = dict(chunks[0].named_parameters())
        damaged = next(p for n, p in names.items() if n.endswith("layers.1.mlp.linear_fc2.weight"))
        damaged.main_param.view(-1)[0] = torch.nan
    folder = checkpoint.parent / f"nan-{checkpoint.name}"
    told = {"config": checkpoint, "progress": False}
    expected = [
        r"model\.layers\.1\.mlp\.down_proj\.weight \(trainer ranks? .*1.*\): expected finite values, found 1 NaN"
    ]
    faults = unsaid(expected, lambda: export_checkpoint(source, folder, "blockwise-pow2", **told))
    dist.barrier()
    return faults + [f"{path} is left" for path in folder.glob("*.safetensors")]


def check_unregistered(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """A distributed checkpoint of a model that Megatron-Bridge has no bridge for, and of none at all."""
    folder = checkpoint.with_name(f"unregistered-{dist.get_rank()}")
    folder.mkdir()
    faults = unsaid(
        [r"knows no model of \S*unregistered"],
        lambda: DistributedCheckpointSource.of(folder, folder),
        whole=True,
    )
    told = {"model_type": "bloom", "architectures": ["BloomForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(told))
    expected = [r"knows no model of \S*unregistered-\d: .*'BloomForCausalLM' is not yet supported"]
    return faults + unsaid(
        expected, lambda: DistributedCheckpointSource.of(folder, folder), whole=True
    )


def check_missing_rank(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """A rank whose boxes never came."""
    bridge, chunks = load(checkpoint, axes)
    merged = gather(MegatronSource(chunks, bridge).manifest())
    found = Manifest(merged.tensors, {r: b for r, b in merged.ranks.items() if r != 3})
    expected = [
        r"lm_head\.weight: expected 65536 elements of \[256, 256\], found 32768",
        r"layers\.1\.self_attn\.k_proj\.weight: expected 65536 elements",
    ]
    return unsaid(expected, lambda: check_tiling(found))


def check_changed_form(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """A parameter that became FP8, and one that was replaced, after the manifest was written."""
    bridge, chunks = load(checkpoint, axes)
    source = MegatronSource(chunks, bridge)
    source.manifest()
    source.storages()
    names = dict(pairs.linear_weights(chunks))
    first, last = next(iter(names)), list(names)[-1]
    pairs.make_pair(names[first], Formula.POW2)
    names[last].data = names[last].data.t().contiguous().t()
    expected = [
        r"rank \d: decoder\.\S+: expected torch\.bfloat16 .*, found torch\.float8_e4m3fn",
        r"rank \d: decoder\.layers\.1\.\S+: expected torch\.bfloat16 .* found .* with strides \[1, ",
    ]
    return unsaid(expected, source.storages)


def unsaid(expected: list[str], act: Callable[[], object], *, whole: bool = False) -> list[str]:
    """Return what the error of `act` does not say, and all that it says; nothing if it says all.

    Its violations are looked at, or with `whole` the text.
    """
    try:
        act()
    except Fp8SyncError as error:
        lines = (" ".join(str(error).split()),) if whole else error.violations
        missing = [f"not said: {e}" for e in expected if not any(re.search(e, x) for x in lines)]
        return [*missing, *lines] if missing else []
    return ["expected an error, found none"]
