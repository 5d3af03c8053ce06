"""Layouts against Megatron-Bridge's own mappings and split functions, on random shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.megatron import cpu

cpu.import_bridge()

from megatron.bridge.models.conversion import param_mapping  # noqa: E402  (after the stand-in)

from fp8sync import cli  # noqa: E402
from fp8sync.sources.megatron.mappings import Site, layout_of  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from fp8sync.sources.megatron.pieces import Layout

WIDTH = 3
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module", autouse=True)
def alone():
    """One rank; Megatron-Core asks a group for its rank only once torch.distributed is there."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def named(kind: str, **attributes: Any) -> Any:
    """A module of a class that Megatron-Bridge knows by its name."""
    module = type(kind, (torch.nn.Module,), {})()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def place(mapping: Any, rank: int, size: int) -> Any:
    """Give a mapping a place in a tensor-parallel group, dense and expert."""
    group = SimpleNamespace(rank=lambda: rank, size=lambda: size)
    for one in (mapping, getattr(mapping, "_tp_mapping", mapping)):
        one._tp_group = one._etp_group = group
    return mapping


def assembled(mapping: Any, module: Any, full: torch.Tensor, shards: int, dim: int = 0) -> Any:
    """Cut `full` into shards, and put the HF tensors together from the pieces of each."""
    made: dict[str, torch.Tensor] = {}
    for rank, shard in enumerate(full.chunk(shards, dim)):
        layout: Layout = layout_of(Site.of(place(mapping, rank, shards), module, shard))
        for name, shape in layout.shapes.items():
            made.setdefault(name, torch.full(shape, -1, dtype=full.dtype))
        for piece in layout.pieces:
            cut = shard[_slices(piece.local, piece.shape)]
            made[piece.tensor][_slices(piece.start, piece.shape)] = cut
    return made


def _slices(start: Any, shape: Any) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


heads = st.builds(
    lambda groups, each, rows, gate: SimpleNamespace(
        num_attention_heads=groups * each,
        num_query_groups=groups,
        kv_channels=rows,
        hidden_size=WIDTH,
        attention_output_gate=gate,
    ),
    *(st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 4, 8]), st.booleans()),
)


@settings(deadline=None, max_examples=60)
@given(config=heads, shards=st.sampled_from([1, 2, 4]), bias=st.booleans())
def test_qkv_is_what_the_bridge_splits(config: Any, shards: int, bias: bool) -> None:
    each = config.num_attention_heads * (2 if config.attention_output_gate else 1)
    rows = (each + 2 * config.num_query_groups) * config.kv_channels
    full = torch.arange(rows * WIDTH).view(rows, WIDTH)
    full = full[:, 0].contiguous() if bias else full
    if rows % shards:
        return
    split = param_mapping.split_qkv_biases if bias else param_mapping.split_qkv_weights
    mapping = param_mapping.QKVMapping(QKV, q="q", k="k", v="v")
    made = assembled(mapping, named("TEColumnParallelLinear", config=config), full, shards)
    for name, expected in zip("qkv", split(config, full), strict=True):
        assert torch.equal(made[name].flatten(), expected.flatten())


@settings(deadline=None, max_examples=20)
@given(config=heads, shards=st.sampled_from([1, 2, 4]))
def test_kv_is_what_the_bridge_splits(config: Any, shards: int) -> None:
    rows = 2 * config.num_query_groups * config.kv_channels
    full = torch.arange(rows * WIDTH).view(rows, WIDTH)
    if rows % shards:
        return
    mapping = param_mapping.KVMapping(QKV, k="k", v="v")
    made = assembled(mapping, named("ColumnParallelLinear", config=config), full, shards)
    for name, expected in zip("kv", param_mapping.split_kv_weights(config, full), strict=True):
        assert torch.equal(made[name], expected)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("number", ["weight11", "local_experts.11.linear_fc1.weight"])
def test_stacks_of_experts_are_listed_expert_by_expert(shards: int, number: str) -> None:
    name = f"decoder.layers.2.mlp.experts.{'linear_fc1.' if number[0] == 'w' else ''}{number}"
    fc1 = param_mapping.FusedGatedExpertMapping(name, "model.layers.2.mlp.experts.gate_up_proj")
    fc2 = param_mapping.FusedExpertMapping(
        name.replace("fc1", "fc2"), "model.layers.2.mlp.experts.down_proj"
    )
    gate, up = torch.arange(12 * WIDTH).view(2, 6, WIDTH)
    parts = [t for pair in zip(gate.chunk(shards), up.chunk(shards), strict=True) for t in pair]
    column, row = named("TEColumnParallelGroupedLinear"), named("TERowParallelGroupedLinear")
    made = assembled(fc1, column, torch.cat(parts), shards)
    made |= assembled(fc2, row, gate.t().contiguous(), shards, dim=1)
    expert = "model.layers.2.mlp.experts.11"
    assert made.keys() == {f"{expert}.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert torch.equal(made[f"{expert}.gate_proj.weight"], gate)
    assert torch.equal(made[f"{expert}.up_proj.weight"], up)
    assert torch.equal(made[f"{expert}.down_proj.weight"], gate.t())


@pytest.mark.parametrize(
    ("module", "name", "shape"),
    [
        (named("TELinear", parallel_mode=None), "linear_kv_down_proj.weight", (6, WIDTH)),
        (named("TELinear", parallel_mode="column"), "linear_kv_down_proj.weight", (12, WIDTH)),
        (named("ColumnParallelLinear"), "linear_kv_down_proj.weight", (12, WIDTH)),
        (named("TELayerNormColumnParallelLinear"), "linear_fc1.layer_norm_weight", (6, WIDTH)),
        (named("TELayerNormColumnParallelLinear"), "linear_fc1.weight", (12, WIDTH)),
        (named("TERowParallelLinear"), "linear_proj.weight", (6, 2 * WIDTH)),
        (named("TopKRouter"), "mlp.router.weight", (6, WIDTH)),
    ],
)
def test_a_module_says_how_it_is_divided(module: Any, name: str, shape: tuple[int, ...]) -> None:
    mapping = place(param_mapping.AutoMapping(f"decoder.layers.0.{name}", "hf"), 1, 2)
    layout = layout_of(Site.of(mapping, module, torch.empty(6, WIDTH)))
    assert layout.shapes == {"hf": shape}


def test_attributes_that_contradict_the_mapping_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.empty(6, WIDTH))
    parameter.tensor_model_parallel, parameter.partition_dim = True, 0
    mapping = place(param_mapping.ReplicatedMapping("decoder.x.weight", "hf"), 0, 2)
    with pytest.raises(ValueError, match="replicates it, the parameter is divided along dim 0"):
        layout_of(Site.of(mapping, named("TopKRouter"), parameter))


@pytest.mark.parametrize("experts", ["experts", "shared_experts"])
def test_gate_and_up_in_strips_are_refused(experts: str) -> None:
    option = f"moe_{'mlp' if experts == 'experts' else 'shared_expert'}_glu_interleave_size"
    name = f"decoder.layers.0.mlp.{experts}.linear_fc1.weight"
    mapping = place(param_mapping.GatedMLPMapping(name, gate="gate", up="up"), 0, 1)
    for strips in (None, 32):
        config = SimpleNamespace(**{option: strips})
        site = Site.of(mapping, named("TELinear", config=config), torch.empty(128, WIDTH))
        if strips is None:
            assert layout_of(site).shapes == {"gate": (64, WIDTH), "up": (64, WIDTH)}
            continue
        with pytest.raises(ValueError, match=rf"alternate in strips of 32 rows \({option}\)"):
            layout_of(site)


class OwnMapping(param_mapping.QKVMapping):
    """Someone's own; it may do anything."""


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        (OwnMapping(QKV, q="q", k="k", v="v"), "OwnMapping is not known"),
        (param_mapping.MambaInProjMapping("a.weight", "b"), "MambaInProjMapping is not known"),
        (
            param_mapping.RMSNorm2ZeroCenteredRMSNormMapping("a.weight", "b"),
            "RMSNorm2ZeroCenteredRMSNormMapping is not known",
        ),
        (param_mapping.AutoMapping("a.weight", "b", (1, 0)), r"permutes dims \(1, 0\)"),
        (param_mapping.AutoMapping("a.weight", "b"), "cannot tell how a Embedding is divided"),
        (
            param_mapping.FusedExpertMapping("experts.linear_fc2.weight1", "x.experts.w2"),
            r"a stack of experts named x\.experts\.w2",
        ),
    ],
)
def test_what_is_not_known_to_be_boxes_is_refused_by_name(mapping: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        layout_of(Site.of(place(mapping, 0, 1), torch.nn.Embedding(1, 1), torch.empty(2, 2)))


def test_an_architecture_without_a_bridge_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.bridge import AutoBridge
    from transformers import MixtralConfig

    config = MixtralConfig(architectures=["MixtralForCausalLM"])
    with pytest.raises(ValueError, match="MixtralForCausalLM"):
        AutoBridge.from_hf_config(config)
    config.save_pretrained(tmp_path)
    (tmp_path / ".metadata").touch()
    command = ["export", str(tmp_path), str(tmp_path / "made"), "--config", str(tmp_path)]
    assert cli.main([*command, "--format", "bf16"]) == 1
    assert "MixtralForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
