"""A module is not walked for each refit; whatever becomes of its tensors meanwhile is noticed all the same."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fp8sync.errors import TensorMismatch, UnsupportedLayout
from fp8sync.sources import ModuleSource, as_source
from fp8sync.sources.places import LazyTensors, ModuleState
from tests.unit.experts import Expert, Model, as_it_lies, assert_same, one, random, told, trained

if TYPE_CHECKING:
    from collections.abc import Callable


def replaced(m: Model) -> None:
    one(m).weight = nn.Parameter(random(one(m).weight))


def replaced_in_its_dict(m: Model) -> None:
    one(m)._parameters["weight"] = nn.Parameter(random(one(m).weight))


def another_dict(m: Model) -> None:
    one(m)._parameters = {n: nn.Parameter(random(p)) for n, p in one(m)._parameters.items()}


def another_dict_of_everything(m: Model) -> None:
    m.experts[1].__dict__ = Expert().__dict__
    one(m).__dict__ = nn.Linear(3, 4).__dict__


def other_data(m: Model) -> None:
    one(m).weight.data = random(one(m).weight)


def swapped(m: Model) -> None:
    torch.utils.swap_tensors(one(m).weight, nn.Parameter(random(one(m).weight)))


def scalar_of_equal_value(m: Model) -> None:
    """Tensors that compare equal are not the same tensor."""
    m.scale = nn.Parameter(m.scale.detach().clone())


def loaded_by_assignment(m: Model) -> None:
    m.load_state_dict({n: random(t) for n, t in m.state_dict().items()}, assign=True)


def of_another_dtype(m: Model) -> None:
    m.to(torch.bfloat16)


def another_buffer(m: Model) -> None:
    m.experts[2].steps = torch.rand(2)


def a_buffer_instead(m: Model) -> None:
    del one(m).weight
    one(m).register_buffer("weight", torch.rand(4, 3))


def another_leaf(m: Model) -> None:
    m.experts[1].up = nn.Linear(3, 4)


def another_branch(m: Model) -> None:
    m.experts[0] = Expert()


def another_branch_in_its_dict(m: Model) -> None:
    m._modules["experts"] = nn.ModuleList(Expert() for _ in range(3))


def branches_changed_places(m: Model) -> None:
    m.experts[0], m.experts[2] = m.experts[2], m.experts[0]


CHANGES = (
    trained,
    replaced,
    replaced_in_its_dict,
    another_dict,
    another_dict_of_everything,
    other_data,
    swapped,
    scalar_of_equal_value,
    loaded_by_assignment,
    of_another_dtype,
    another_buffer,
    a_buffer_instead,
    another_leaf,
    another_branch,
    another_branch_in_its_dict,
    branches_changed_places,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_tensors_are_those_that_the_module_has_now(change: Callable[[Model], None]) -> None:
    module = Model()
    source = ModuleSource(module)
    assert list(source.manifest().tensors) == list(told(module))
    assert isinstance(source.storages(), LazyTensors)
    before = {n: as_it_lies(t) for n, t in source.storages().items()}
    change(module)
    assert before != {n: as_it_lies(t) for n, t in told(module).items()}
    assert_same(source.storages(), told(module))
    change(module)
    assert_same(source.storages(), told(module))


def test_a_module_is_not_walked_twice(monkeypatch) -> None:
    module = Model()
    state = ModuleState(module, id)
    listed = state.walk()
    monkeypatch.setattr("fp8sync.sources.places._tensors", lambda _: pytest.fail("walked"))
    assert all(value is listed[name] for name, value in state.read().items())


def test_replaced_parameters_are_let_go() -> None:
    """The trainer may have no room for both."""
    module = Model()
    source = ModuleSource(module)
    source.manifest()
    old = weakref.ref(source.storages()["experts.1.up.weight"])
    assert old() is not None
    replaced(module)
    assert old() is None


def test_what_is_gone_is_not_found() -> None:
    module = Model()
    source = ModuleSource(module)
    source.manifest()
    one(module).bias = None
    del module.head.weight
    module.experts[0].register_buffer("steps", torch.rand(2), persistent=False)
    module.experts[2] = nn.Linear(3, 4)
    storages = source.storages()
    for name in ("experts.1.up.bias", "head.weight", "experts.0.steps", "experts.2.up.weight"):
        assert name not in told(module)
        with pytest.raises(KeyError, match=name):
            storages[name]


# --- ties -------------------------------------------------------------------------------------------


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


def untied_by_a_parameter(m: Tied) -> None:
    m.head.weight = nn.Parameter(random(m.head.weight))


def untied_by_a_module(m: Tied) -> None:
    m.head = nn.Linear(3, 5, bias=False)


def untied_in_memory(m: Tied) -> None:
    m.head.weight = nn.Parameter(m.embed.weight.data)  # another parameter of the same memory
    assert ModuleSource(m).storages().keys() == told(m).keys() - {"head.weight"}
    m.embed.weight.data = random(m.embed.weight)


@pytest.mark.parametrize("untied", [untied_by_a_parameter, untied_by_a_module, untied_in_memory])
def test_what_is_not_tied_any_more_is_refused(untied: Callable[[Tied], None]) -> None:
    """No plan has it under its own name, so the engine would keep the old one."""
    module = Tied()
    source = ModuleSource(module)
    assert "head.weight" not in source.manifest().tensors
    assert "head.weight" not in dict(source.storages())
    trained(module)
    source.storages()
    untied(module)
    with pytest.raises(TensorMismatch) as refusal:
        source.storages()
    assert refusal.value.violations == (
        "head.weight: expected the memory of embed.weight, found its own",
    )
    assert "head.weight" in source.manifest().tensors
    assert_same(source.storages(), told(module))


def test_what_is_tied_later_is_read_under_both_names() -> None:
    module = Model()
    source = ModuleSource(module)
    source.manifest()
    module.head.weight = module.embed.weight
    storages = source.storages()
    assert storages["head.weight"] is storages["embed.weight"] is module.embed.weight


def test_a_tied_name_that_is_gone_is_missed_by_nobody() -> None:
    module = Tied()
    source = ModuleSource(module)
    source.manifest()
    module.head = None
    assert_same(source.storages(), told(module))


# --- compiled and wrapped modules ------------------------------------------------------------------


def compiled_within(m: Model) -> Model:
    m.experts[1] = torch.compile(m.experts[1])
    m.experts[2].up = torch.compile(m.experts[2].up)
    return m


def compiled_twice(m: Model) -> Model:
    return torch.compile(compiled_within(m))


def compiled_in_place(m: Model) -> Model:
    m.compile()
    return m


WRAPPED = (compiled_within, compiled_twice, compiled_in_place, torch.compile)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("wrapped", WRAPPED, ids=lambda wrapped: wrapped.__name__)
@pytest.mark.parametrize("change", [replaced, another_leaf, another_branch, loaded_by_assignment])
def test_compiled_modules_go_by_the_names_they_had(
    wrapped: Callable[[Model], Model], change: Callable[[Model], None], monkeypatch
) -> None:
    module = Model()
    names = list(told(module))
    source = as_source(wrapped(module))
    assert list(source.manifest().tensors) == names
    for step in (trained, change):
        step(one_by_one(module))
        assert_same(source.storages(), as_written(told(module)))
    monkeypatch.setattr("fp8sync.sources.places._tensors", lambda _: pytest.fail("walked"))
    assert list(dict(source.storages())) == names


def one_by_one(m: Model) -> Model:
    """Let changes reach the module that a compiled one wraps."""
    plain = Model()
    plain._modules = {n: getattr(c, "_orig_mod", c) for n, c in m._modules.items()}
    plain._parameters = m._parameters
    return plain


def as_written(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}


@pytest.mark.usefixtures("compiling")
def test_layers_that_recompute_go_by_the_names_they_had() -> None:
    """Torch's own hook takes the wrapper out of names, whichever of the two is outside."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module = Model()
    names = list(told(module))
    module.experts[0] = checkpoint_wrapper(module.experts[0])
    module.experts[1] = torch.compile(checkpoint_wrapper(module.experts[1]))
    module.experts[2] = checkpoint_wrapper(torch.compile(module.experts[2]))
    source = as_source(torch.compile(module))
    assert list(source.manifest().tensors) == names
    trained(module)
    assert_same(source.storages(), as_written(told(module)))


def test_tensors_that_a_compiled_module_would_hide_are_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    module[0].add_module("_orig_mod", nn.Linear(3, 3, bias=False))
    with pytest.raises(UnsupportedLayout, match="hide tensors of the same name") as refusal:
        ModuleSource(module).manifest()
    (line,) = refusal.value.violations
    assert line.startswith("0.weight: expected one tensor, found another one as 0.")


# --- FSDP2 ------------------------------------------------------------------------------------------


def test_shards_are_read_while_fsdp2_shows_whole_parameters(tmp_path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from fp8sync.sources.dtensor import DTensorSource

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        mesh = init_device_mesh("cpu", (1,))
        for part in (module[0], module):
            fully_shard(part, mesh=mesh, reshard_after_forward=False)
        source = DTensorSource(module, 0)
        source.manifest()
        for _ in range(3):
            before = {n: t.detach().clone() for n, t in source.storages().items()}
            loss = module(torch.rand(2, 4)).sum()
            loss.backward()
            torch.optim.SGD(module.parameters(), lr=0.1).step()
            module(torch.rand(2, 4))
            shown = dict(module.named_parameters())
            assert not any(isinstance(value, DTensor) for value in shown.values())
            found = source.storages()
            wanted = module.state_dict()
            assert not any(torch.equal(before[name], value) for name, value in found.items())
            assert_same(found, {name: value.to_local() for name, value in wanted.items()})
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("compiled_first", [False, True])
def test_compiled_layers_of_fsdp2_go_by_the_names_they_had(tmp_path, compiled_first: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from fp8sync.sources.dtensor import DTensorSource

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = Model()
        names = list(told(module))
        mesh = init_device_mesh("cpu", (1,))
        for number in range(3):
            if compiled_first:
                module.experts[number] = torch.compile(module.experts[number])
                fully_shard(module.experts[number], mesh=mesh)
            else:
                fully_shard(module.experts[number], mesh=mesh)
                module.experts[number] = torch.compile(module.experts[number])
        fully_shard(module, mesh=mesh, ignored_params={module.scale})
        source = as_source(torch.compile(module))
        assert isinstance(source, DTensorSource)
        assert list(source.manifest().tensors) == names
        trained(module)
        wanted = as_written(told(module))
        wanted = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in wanted.items()}
        assert_same(source.storages(), wanted)
    finally:
        dist.destroy_process_group()
