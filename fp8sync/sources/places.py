"""A module's tensors under their `state_dict` names, without a walk through the module for every refit.

`state_dict` takes some microseconds for each module, and a model whose experts lie one by one has tens of
thousands, all before anything is sent. Torch's own goes from `_modules` to `_modules` and lists
`_parameters` and persistent `_buffers`. Where it is torch's own throughout, it is remembered which module
keeps a tensor, never the tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import compress, islice, repeat
from operator import attrgetter, contains, eq, itemgetter
from typing import NamedTuple

import torch
from torch import nn

from fp8sync.errors import TensorMismatch, UnsupportedLayout

__all__ = ["COMPILED", "LazyTensors", "ModuleState"]

COMPILED = "_orig_mod"
"""Under which `torch.compile` keeps the module that it wraps, and `state_dict` names what is in it."""

# Children are compared by `==`, which torch leaves at identity.
_methods = attrgetter("state_dict", "_save_to_state_dict", "get_extra_state", "__eq__")
_TORCHS = _methods(nn.Module)

BLOCK = 256
"""Tensors that are looked up at once."""


class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, looked up when they are first asked for: a GPU may be at others meanwhile.

    Args:
        names: of all.
        look_up: returns the tensor of a name, if there is one, and perhaps others that are asked for next.
    """

    def __init__(
        self, names: Collection[str], look_up: Callable[[str], Mapping[str, torch.Tensor]]
    ) -> None:
        self._names, self._look_up = names, look_up
        self._found: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._found:
            self._found.update(self._look_up(name))
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ModuleState:
    """What a module's `state_dict` holds, again and again: tensors are looked up, modules remembered.

    Names are those of the module before any part of it was compiled.

    Args:
        module: whose tensors.
        key: equal for tensors that are tied.
    """

    def __init__(self, module: nn.Module, key: Callable[[torch.Tensor], object]) -> None:
        self._module, self._key = module, key
        self._places: _Places | None = None
        self._names: list[str] = []
        self._tied: dict[str, str] = {}

    def walk(self) -> dict[str, torch.Tensor]:
        """Return the tensors of `state_dict`, not detached, tied ones once; who keeps them is remembered.

        Raises:
            UnsupportedLayout: a compiled module keeps a tensor beside the module it wraps, which has
                another one of that name.
        """
        self._tied = {}
        firsts: dict[object, str] = {}
        listed = {}
        for name, value in self._remember().items():
            first = firsts.setdefault(self._key(value), name)
            if first == name:
                listed[name] = value
            else:
                self._tied[name] = first
        self._names = list(listed)
        return listed

    def read(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors that the last `walk` listed, as they are now.

        A module that has a `state_dict` of its own somewhere, or hooks after it, is asked anew; one whose
        modules are others than they were is walked again.

        Raises:
            TensorMismatch: what was tied is not any more, so that nobody would send it.
        """
        if not self._names:
            return self.walk()
        held = LazyTensors(self._names, self._look_up())
        untied = [
            f"{name}: expected the memory of {first}, found its own"
            for name, first in self._tied.items()
            if name in held and self._key(held[name]) != self._key(held[first])
        ]
        if untied:
            raise TensorMismatch("parameters that were tied when the link was made", untied)
        return held

    def _look_up(self) -> Callable[[str], Mapping[str, torch.Tensor]]:
        places = self._places
        if places is not None and places.stand():
            return lambda name: places.block(name) or _tensors(self._module)
        whole = _tensors(self._module) if places is None else self._remember()
        return lambda _: whole

    def _remember(self) -> dict[str, torch.Tensor]:
        found = _tensors(self._module)
        self._places = _Places.of(self._module, found)
        return found


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    faults = []
    for told, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            continue
        name = _as_written(told) if COMPILED in told else told
        if found.setdefault(name, value) is not value:
            faults.append(f"{name}: expected one tensor, found another one as {told}")
    if faults:
        raise UnsupportedLayout("compiled modules hide tensors of the same name", faults)
    return found


def _as_written(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != COMPILED)


class _Block(NamedTuple):
    names: list[str]
    modules: tuple[nn.Module, ...]
    keys: tuple[str, ...]


class _Places:
    """The modules that keep tensors, in blocks of tensors that follow each other in `state_dict`."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._at: dict[str, int] = {}
        self._parents: list[nn.Module] = []
        self._children: list[dict[str, nn.Module | None]] = []
        self._kinds: set[type[nn.Module]] = set()

    @classmethod
    def of(cls, root: nn.Module, found: Mapping[str, torch.Tensor]) -> _Places | None:
        """Return who keeps what `state_dict` found; nothing if it did more than to list tensors."""
        places, rest = cls(), [(root, "")]
        keepers: dict[str, tuple[nn.Module, str]] = {}
        visited = []
        while rest:
            module, prefix = rest.pop()
            visited.append(module)
            kept = module._modules, module._parameters, module._buffers
            if not (_has_torchs(type(module)) and {*map(type, kept)} <= {dict, OrderedDict}):
                return None
            places._kinds.add(type(module))
            if module._modules:
                places._parents.append(module)
                places._children.append(dict(module._modules))
            keepers |= {prefix + k: (module, k) for k in (*module._parameters, *module._buffers)}
            for name, child in module._modules.items():
                if child is not None:
                    rest.append((child, prefix if name == COMPILED else f"{prefix}{name}."))
        if not found.keys() <= keepers.keys():
            return None
        places._cut({name: keepers[name] for name in found})
        blocks = [places.block(block.names[0]) for block in places._blocks]
        held = {name: value for block in blocks if block for name, value in block.items()}
        same = all(held.get(name) is value for name, value in found.items())
        return places if same and places._listed(visited) and places.stand() else None

    def _cut(self, keepers: Mapping[str, tuple[nn.Module, str]]) -> None:
        rest = iter(keepers.items())
        while some := list(islice(rest, BLOCK)):
            self._at |= {name: len(self._blocks) for name, _ in some}
            modules, keys = zip(*(place for _, place in some), strict=True)
            self._blocks.append(_Block([name for name, _ in some], modules, keys))

    def stand(self) -> bool:
        """Whether `state_dict` would still come to the same modules."""
        return (
            all(map(_has_torchs, self._kinds))
            and self._listed(self._parents)
            and all(map(eq, self._children, map(attrgetter("_modules"), self._parents)))
        )

    def block(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return the tensors of a block as their modules keep them now; nothing if `state_dict` has to say."""
        names, modules, keys = self._blocks[self._at[name]]
        if not self._listed(modules):
            return None
        parameters = map(dict.get, map(attrgetter("_parameters"), modules), keys)
        found = {n: v for n, v in zip(names, parameters, strict=True) if v is not None}
        if len(found) < len(names):
            others = (p for p in zip(names, modules, keys, strict=True) if p[0] not in found)
            buffers = {n: m._buffers.get(k) for n, m, k in others if _persists(m, k)}
            found |= {n: v for n, v in buffers.items() if v is not None}
        return found if len(found) == len(names) else None

    def _listed(self, modules: Sequence[nn.Module]) -> bool:
        """Whether all that `state_dict` does with these modules themselves is to list what they keep."""
        # No bytecode for each: they may be tens of thousands.
        own = list(map(vars, modules))
        hooked = compress(modules, map(itemgetter("_state_dict_pre_hooks"), own))
        return not (
            set(map(type, modules)) - self._kinds
            or any(map(itemgetter("_state_dict_hooks"), own))
            or any(map(contains, own, repeat("state_dict")))
            or any(map(contains, own, repeat("_save_to_state_dict")))
            or not all(map(_resharded, hooked))
        )


def _has_torchs(kind: type[nn.Module]) -> bool:
    return bool(_methods(kind) == _TORCHS)


def _persists(module: nn.Module, key: str) -> bool:
    return key not in module._non_persistent_buffers_set


def _resharded(module: nn.Module) -> bool:
    """Call the hooks before `state_dict`, if all are FSDP2's: they put shards back, where there are none."""
    hooks = tuple(module._state_dict_pre_hooks.values())
    if not all(getattr(hook, "__module__", "").endswith("._fsdp_param_group") for hook in hooks):
        return False
    for hook in hooks:
        hook(module, "", True)
    return True
