"""A plain module as boxes: each HF tensor once, under its checkpoint name, or a refusal."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import Manifest
from fp8sync.sources import ModuleSource, as_source
from tests.unit.layouts import tensor_window


def seen_through(source: ModuleSource) -> dict[str, torch.Tensor]:
    """The HF tensors that the source's boxes show in its storages."""
    storages = source.storages()
    manifest = source.manifest()
    shown = {}
    for box in manifest.ranks[0]:
        base = storages[box.at.storage]
        assert box.start == (0,) * len(box.shape)
        assert box.shape == manifest.tensors[box.tensor].shape
        shown[box.tensor] = tensor_window(base, box.at, box.shape)
    assert list(shown) == list(manifest.tensors)
    return shown


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and torch.equal(a, b)


def test_parameters_and_buffers_under_their_state_dict_names() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    module.register_buffer("scratch", torch.zeros(3), persistent=False)
    shown = seen_through(ModuleSource(module))
    assert list(shown) == list(module.state_dict())
    assert "scratch" not in shown
    for name, tensor in module.state_dict().items():
        assert same_memory(shown[name], tensor)
    infos = ModuleSource(module).manifest().tensors
    assert infos["0.weight"].dtype == "bfloat16"
    assert infos["1.num_batches_tracked"].dtype == "int64"
    assert infos["1.num_batches_tracked"].shape == ()


def test_storages_are_live() -> None:
    module = nn.Linear(4, 4)
    source = ModuleSource(module)
    before = source.manifest().digest()
    with torch.no_grad():
        module.weight.fill_(7.0)
    assert source.storages()["weight"].unique().tolist() == [7.0]
    module.weight = nn.Parameter(torch.full((4, 4), 8.0))  # as some optimizers replace them
    assert source.storages()["weight"].unique().tolist() == [8.0]
    assert source.manifest().digest() == before


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def test_tied_weights_are_listed_once() -> None:
    assert list(ModuleSource(Tied()).manifest().tensors) == ["embed_tokens.weight"]


def test_equal_values_are_not_tied() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    with torch.no_grad():
        module["b"].weight.copy_(module["a"].weight)
    assert list(ModuleSource(module).manifest().tensors) == ["a.weight", "b.weight"]


def test_views_of_one_memory_are_different_tensors() -> None:
    """Halves of a fused weight, and a transposed view: same memory, other tensors."""
    fused = torch.arange(32.0).view(8, 4)
    module = nn.Module()
    for name, view in {"top": fused[:4], "bottom": fused[4:], "turned": fused[:4].T}.items():
        setattr(module, name, nn.Parameter(view))
    shown = seen_through(ModuleSource(module))
    assert list(shown) == ["top", "bottom", "turned"]
    assert torch.equal(shown["bottom"], fused[4:])
    assert torch.equal(shown["turned"], fused[:4].T)


class Experts(nn.Module):
    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.Module()
        self.mlp.experts.gate_up_proj = nn.Parameter(gate_up)
        self.mlp.experts.down_proj = nn.Parameter(down)


@pytest.mark.parametrize("strided", [False, True])
def test_expert_stacks_are_listed_per_expert(strided: bool) -> None:
    gate_up, down = torch.randn(3, 10, 4), torch.randn(3, 4, 5)
    if strided:  # stacks that a trainer keeps with padding, or transposed
        gate_up = torch.randn(3, 12, 8)[:, 1:11, 2:6]
        down = torch.randn(3, 5, 4).transpose(1, 2)
    shown = seen_through(ModuleSource(Experts(gate_up, down)))
    names = [
        *(f"mlp.experts.{e}.{part}.weight" for e in range(3) for part in ("gate_proj", "up_proj")),
        *(f"mlp.experts.{e}.down_proj.weight" for e in range(3)),
    ]
    assert list(shown) == names
    for expert in range(3):
        gate, up, down_one = (
            shown[f"mlp.experts.{expert}.{part}.weight"]
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        assert torch.equal(torch.cat([gate, up]), gate_up[expert])
        assert torch.equal(down_one, down[expert])


def test_stacks_without_a_gate_are_listed_per_expert() -> None:
    up, down = torch.randn(3, 5, 4), torch.randn(3, 4, 5)
    module = Experts(up, down)
    module.mlp.experts.up_proj = module.mlp.experts._parameters.pop("gate_up_proj")
    shown = seen_through(ModuleSource(module))
    assert len(shown) == 6
    for expert in range(3):
        assert torch.equal(shown[f"mlp.experts.{expert}.up_proj.weight"], up[expert])
        assert torch.equal(shown[f"mlp.experts.{expert}.down_proj.weight"], down[expert])


def test_other_parameters_called_experts_stay_whole() -> None:
    module = nn.Module()
    module.experts = nn.Module()
    module.experts.bias = nn.Parameter(torch.zeros(3, 4))
    module.experts.down_proj = nn.Linear(4, 4, bias=False)
    assert list(ModuleSource(module).manifest().tensors) == [
        "experts.bias",
        "experts.down_proj.weight",
    ]


def test_a_rank_of_its_own_is_zero() -> None:
    manifest = ModuleSource(nn.Linear(4, 4)).manifest()
    assert list(manifest.ranks) == [0]
    assert Manifest.from_json(manifest.to_json()) == manifest


# --- refusals -------------------------------------------------------------------------------------


def test_meta_parameters_are_refused_all_at_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 2))
    with pytest.raises(UnsupportedLayout) as refusal:
        ModuleSource(module).manifest()
    assert refusal.value.violations == (
        "0.weight: expected data, found a meta tensor",
        "0.bias: expected data, found a meta tensor",
    )


def test_meta_parameters_of_one_shape_are_all_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta"))
    with pytest.raises(UnsupportedLayout) as refusal:
        ModuleSource(module).manifest()
    named = [line.split(":")[0] for line in refusal.value.violations]
    assert named == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_kinds_of_parameters_that_are_not_known_are_refused() -> None:
    """Packed weights: what they hold is not what their shape says."""
    module = nn.Linear(4, 4, bias=False)
    module.weight = type("Int8Params", (nn.Parameter,), {})(module.weight.detach())
    with pytest.raises(UnsupportedLayout) as refusal:
        ModuleSource(module).manifest()
    assert refusal.value.violations == ("weight: expected a plain tensor, found Int8Params",)


def test_a_megatron_model_without_its_bridge_is_refused() -> None:
    module = nn.Linear(4, 4)
    module.weight.tensor_model_parallel = True
    with pytest.raises(UnsupportedLayout, match="is a Megatron-Core model: expected its bridge="):
        as_source(module)


def test_shards_of_zero_3_are_refused() -> None:
    """Its parameters have no elements between two uses, and say so by an attribute."""
    module = nn.Linear(4, 4)
    module.weight.ds_numel = 16
    assert as_source(module)  # gathered
    module.weight.data = torch.empty(0)
    with pytest.raises(UnsupportedLayout, match="DeepSpeed ZeRO-3: expected gathered parameters"):
        as_source(module)


def test_freed_memory_is_refused_by_name() -> None:
    """An offloader's: weights of one shape all lie at no address, and are not tied for that."""
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for parameter in module.parameters():
        parameter.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedLayout) as refusal:
        ModuleSource(module).manifest()
    assert refusal.value.violations == (
        "0.weight: expected data, found freed memory",
        "1.weight: expected data, found freed memory",
    )


def test_adapters_that_are_not_merged_are_refused() -> None:
    module = nn.Module()
    module.q_proj = nn.Module()
    module.q_proj.base_layer = nn.Linear(4, 4)
    assert as_source(module)  # a checkpoint may name its own tensors so
    module.peft_config = {}
    with pytest.raises(UnsupportedLayout, match="expected them merged"):
        as_source(module)


def test_fsdp1_is_refused() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = nn.Sequential(
            FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
        )
        with pytest.raises(UnsupportedLayout, match=r"FSDP1.: expected fully_shard"):
            as_source(module)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2, torch.uint32])
def test_dtypes_that_cannot_travel_are_refused(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.register_buffer("odd", torch.zeros(4).to(dtype))
    with pytest.raises(UnsupportedLayout) as refusal:
        ModuleSource(module).manifest()
    name = str(dtype).removeprefix("torch.")
    assert refusal.value.violations == (f"odd: dtype {name} cannot travel",)


@pytest.fixture
def one_rank_mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.usefixtures("compiling")
def test_a_module_in_ddp_or_compiled_is_the_module(one_rank_mesh) -> None:
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    for module in (wrapped, torch.compile(wrapped)):
        assert list(as_source(module).manifest().tensors) == ["weight", "bias"]
    compiled = nn.parallel.DistributedDataParallel(torch.compile(nn.Linear(4, 4)))
    assert list(as_source(compiled).manifest().tensors) == ["weight", "bias"]


def test_distributed_parameters_are_refused(one_rank_mesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    module = nn.Linear(4, 4)
    sharded = distribute_tensor(module.weight.detach(), one_rank_mesh, [Shard(0)])
    module.weight = nn.Parameter(sharded)
    with pytest.raises(UnsupportedLayout) as refusal:
        ModuleSource(module).manifest()
    assert refusal.value.violations == ("weight: expected a plain tensor, found DTensor",)


class Codes(torch.Tensor):
    """A quantized weight as libraries make them: a tensor subclass over other tensors."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Codes:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes)
        raise NotImplementedError(f"{func} would dequantize")


def test_quantized_parameters_are_refused() -> None:
    module = nn.Linear(4, 4, bias=False)
    module.weight = nn.Parameter(Codes(torch.zeros(4, 4, dtype=torch.uint8)), requires_grad=False)
    with pytest.raises(UnsupportedLayout) as refusal:
        ModuleSource(module).manifest()
    assert refusal.value.violations == ("weight: expected a plain tensor, found Codes",)


def test_expert_stacks_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(UnsupportedLayout, match=r"mlp\.experts\.gate_up_proj"):
        ModuleSource(Experts(torch.zeros(2, 7, 4), torch.zeros(2, 4, 3))).manifest()


def test_transposed_stacks_are_listed_whole() -> None:
    """[E, H, 2I] with [E, I, H], as GPT-OSS keeps them, and its checkpoints, too."""
    gate_up, down = torch.randn(3, 4, 10), torch.randn(3, 5, 4)
    shown = seen_through(ModuleSource(Experts(gate_up, down)))
    assert shown.keys() == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert torch.equal(shown["mlp.experts.gate_up_proj"], gate_up)
    assert torch.equal(shown["mlp.experts.down_proj"], down)


def test_only_modules_and_sources_are_taken() -> None:
    source = ModuleSource(nn.Linear(2, 2))
    assert as_source(source) is source
    assert isinstance(as_source(nn.Linear(2, 2)), ModuleSource)
    with pytest.raises(UnsupportedLayout, match="cannot read weights from dict"):
        as_source({"weight": torch.zeros(2)})


def test_masters_are_those_of_megatron_alone() -> None:
    with pytest.raises(
        UnsupportedLayout, match=r"master=True: expected Megatron-Core .* found Linear"
    ):
        as_source(nn.Linear(2, 2), master=True)
