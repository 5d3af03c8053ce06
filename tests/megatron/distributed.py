"""Distributed checkpoints that Megatron-Core wrote from any layout, read and exported without a model."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors.torch import load_file

from fp8sync import cli
from fp8sync.export import export_checkpoint
from fp8sync.recipe import Formula
from fp8sync.sources.megatron import DistributedCheckpointSource
from tests.megatron import cpu
from tests.megatron.checks import LINEAR, as_quantized, differences, load, reference
from tests.megatron.refusals import unsaid
from tests.megatron.transfer import SCALES

if TYPE_CHECKING:
    from pathlib import Path


def check_checkpoint(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """`fp8sync export` of it, on all ranks: the directory that transformers saved, bit for bit."""
    folder, faults = _save(checkpoint, axes), []
    for kind in ("bf16", "fp8"):
        made = _fresh(folder.with_name(f"{folder.name}-{kind}"))
        asked = [str(folder), str(made), "--format", kind, "--config", str(checkpoint)]
        if cli.main(["export", *asked]):
            faults.append(f"export --format {kind} failed")
        dist.barrier()
        found = {n.replace("_scale_inv", SCALES): t for n, t in _tensors(made).items()}
        expected = reference(checkpoint)
        if kind == "fp8":
            formulas = {n: Formula.POW2 for n in expected if LINEAR.search(n)}
            expected = as_quantized(expected, formulas)
        faults += differences(found, expected)
    return faults


def check_bad_checkpoint(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Of another model: a layer too few, and heads without norms."""
    folder = _save(checkpoint, axes)
    other = _fresh(folder.with_name("other"))
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 3}
    config.pop("layer_types", None)
    if dist.get_rank() == 0:
        other.mkdir()
        (other / "config.json").write_text(json.dumps(config))
    dist.barrier()
    expected = [
        r"decoder\.layers\.2: expected in the checkpoint, found nothing",
        r"layers\.1\.self_attention\.k_layernorm\.weight: expected a mapping of LlamaBridge",
    ]
    return unsaid(expected, lambda: DistributedCheckpointSource.of(folder, other).manifest())


def check_cut_checkpoint(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Recurrent layers of another size than the config says; nothing is written."""
    folder = _save(checkpoint, axes)
    other = _fresh(folder.with_name("other"))
    if dist.get_rank() == 0:
        config = json.loads((checkpoint / "config.json").read_text())
        changed = {"qwen3-next": "linear_key_head_dim", "nemotron-h": "mamba_head_dim"}
        config[changed[checkpoint.name]] //= 2
        other.mkdir()
        (other / "config.json").write_text(json.dumps(config))
    dist.barrier()
    mixer = {"qwen3-next": "self_attention", "nemotron-h": "mixer"}[checkpoint.name]
    expected = [
        rf"layers\.0\.{mixer}\.in_proj\.weight: \w+Mapping\w* does not (take|give each)",
        rf"layers\.0\.{mixer}\.conv1d\.weight: \w+Conv1dMapping does not (take|give each)",
    ]
    made = _fresh(folder.with_name(f"{folder.name}-bf16"))
    source = DistributedCheckpointSource.of(folder, other)
    faults = unsaid(expected, lambda: export_checkpoint(source, made, progress=False))
    return faults + [f"{path} is left" for path in made.glob("*")]


def _save(checkpoint: Path, axes: dict[str, int]) -> Path:
    """Write the model, divided so."""
    _, chunks = load(checkpoint, axes)
    folder = _fresh(checkpoint.with_name(f"dist-{checkpoint.name}"))
    save(chunks, folder)
    return folder


def save(chunks: list, folder: Path) -> None:
    """Let Megatron-Core write this rank's part of a model; all ranks call it."""
    from megatron.core import dist_checkpointing

    state: dict[str, Any] = {
        f"model{n}" if len(chunks) > 1 else "model": chunk.sharded_state_dict()
        for n, chunk in enumerate(chunks)
    }
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    with cpu.said_to_be_cuda():
        dist_checkpointing.save(state, str(folder))
    dist.barrier()


def _fresh(folder: Path) -> Path:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    return folder


def _tensors(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
