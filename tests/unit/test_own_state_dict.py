"""Modules whose `state_dict` is not torch's alone are asked, from the first refit or from when they became so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fp8sync.sources import ModuleSource
from tests.unit.experts import Model, one, told, trained

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def doubled(module: nn.Module, held: dict[str, torch.Tensor], prefix: str, _: object) -> None:
    held[prefix + "weight"] = held[prefix + "weight"].detach() * 2


class Doubled(nn.Linear):
    """As libraries do that keep weights otherwise than they save them."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        doubled(self, destination, prefix, None)


class Whole(nn.Linear):
    def state_dict(self, *args, prefix="", **kwargs):
        found = super().state_dict(*args, prefix=prefix, **kwargs)
        doubled(self, found, prefix, None)
        return found


class Extra(nn.Linear):
    def get_extra_state(self) -> torch.Tensor:
        return self.weight.detach().sum()


def hooked_leaf(m: Model) -> None:
    one(m).register_state_dict_post_hook(doubled)


def hooked_branch(m: Model) -> None:
    def hook(module, held, prefix, _):
        doubled(module, held, prefix + "up.", None)

    m.experts[1].register_state_dict_post_hook(hook)


def hooked_root(m: Model) -> None:
    m._register_state_dict_hook(
        lambda module, held, prefix, _: {n: t.detach() + 1 for n, t in held.items()}
    )


def hooked_before(m: Model) -> None:
    """As FSDP2 puts its shards back."""

    def hook(module, prefix, keep_vars):
        assert (prefix, keep_vars) in {("experts.1.up.", True), ("experts.1.up.", False)}
        module.weight.data.add_(1)
        module.weight = nn.Parameter(module.weight.detach().clone())

    one(m).register_state_dict_pre_hook(hook)


def branch_hooked_before(m: Model) -> None:
    def hook(module, *_):
        module.up = nn.Linear(3, 4)

    m.experts[1].register_state_dict_pre_hook(hook)


def leaf_of_its_own(m: Model) -> None:
    torchs = one(m).state_dict

    def state_dict(*args, prefix="", **kwargs):
        found = torchs(*args, prefix=prefix, **kwargs)
        doubled(one(m), found, prefix, None)
        return found

    one(m).state_dict = state_dict


def saved_in_its_own_way(m: Model) -> None:
    torchs = one(m)._save_to_state_dict

    def save(destination, prefix, keep_vars):
        torchs(destination, prefix, keep_vars)
        doubled(one(m), destination, prefix, None)

    one(m)._save_to_state_dict = save


def root_of_its_own(m: Model) -> None:
    torchs = m.state_dict
    m.state_dict = lambda **kwargs: {n: t.detach() + 1 for n, t in torchs(**kwargs).items()}


def leaf_of_another_class(m: Model) -> None:
    one(m).__class__ = Whole


OWN = (
    hooked_leaf,
    hooked_branch,
    hooked_root,
    leaf_of_its_own,
    saved_in_its_own_way,
    root_of_its_own,
    leaf_of_another_class,
)


def values(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("own", OWN, ids=lambda own: own.__name__)
def test_a_state_dict_that_is_not_torchs_is_asked_each_time(
    own: Callable[[Model], None], late: bool
) -> None:
    module = Model()
    plain = values(told(module))
    source = ModuleSource(module)
    if not late:
        own(module)
    source.manifest()
    source.storages()
    if late:
        own(module)
    assert values(source.storages()) == values(told(module)) != plain
    trained(module)
    assert values(source.storages()) == values(told(module))


def test_a_class_that_is_patched_later() -> None:
    kind = type("Patched", (nn.Linear,), {})
    module = Model()
    module.experts[1].up = kind(3, 4)
    source = ModuleSource(module)
    source.manifest()
    assert values(source.storages()) == values(told(module))
    torchs = kind._save_to_state_dict

    def save(self, destination, prefix, keep_vars):
        torchs(self, destination, prefix, keep_vars)
        doubled(self, destination, prefix, None)

    plain = values(source.storages())
    kind._save_to_state_dict = save
    assert values(source.storages()) == values(told(module)) != plain


@pytest.mark.parametrize("kind", [Doubled, Whole, Extra])
def test_modules_that_save_themselves_in_their_own_way(kind: type[nn.Linear]) -> None:
    module = Model()
    module.experts[1].up = kind(3, 4)
    source = ModuleSource(module)
    assert list(source.manifest().tensors) == list(told(module))
    for _ in range(2):
        trained(module)
        assert values(source.storages()) == values(told(module))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("hooked", [hooked_before, branch_hooked_before])
def test_hooks_that_go_before_are_called(hooked: Callable[[Model], None], late: bool) -> None:
    module = Model()
    source = ModuleSource(module)
    if not late:
        hooked(module)
    source.manifest()
    if late:
        hooked(module)
    for _ in range(2):
        before = one(module).weight
        found = source.storages()["experts.1.up.weight"]
        assert found is one(module).weight
        assert found is not before


def test_what_a_parametrization_took_away_is_not_found() -> None:
    module = Model()
    source = ModuleSource(module)
    source.manifest()
    parametrize.register_parametrization(one(module), "weight", nn.Identity())
    storages = source.storages()
    with pytest.raises(KeyError, match=r"experts\.1\.up\.weight"):
        storages["experts.1.up.weight"]
