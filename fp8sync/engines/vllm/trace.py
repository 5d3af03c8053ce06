"""Watch vLLM's own loader write, and read off which rectangle of an HF tensor goes where.

Sources are meta stand-ins, destinations the model's parameters in load form. A view of a meta tensor
keeps its storage's identity, so every `copy_` tells offset, shape and strides on both sides. A copy
between a view of a checkpoint tensor and a view of a parameter is a *write*; anything else that
reaches a parameter is a transform, and its tensors take the misc path.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8sync.engines.vllm.views import Form, joined, shown
from fp8sync.plan.boxes import Rect, overlap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Trace", "Write", "trace_load"]

_aten = torch.ops.aten
_FILLS = {_aten.fill_.Scalar, _aten.zero_.default, _aten.fill_.Tensor}


@dataclass(frozen=True)
class Write:
    """One pure copy: `source` is in elements of the HF tensor, `target` of the parameter.

    `strides` are the parameter's element strides along the HF tensor's dims, `offset` the first element.
    """

    tensor: str
    source: Rect
    storage: str
    target: Rect
    offset: int
    strides: tuple[int, ...]


@dataclass
class Trace:
    """What one pass of the loader did, by tensor name."""

    writes: dict[str, list[Write]] = field(default_factory=lambda: defaultdict(list))
    constants: dict[str, list[tuple[Rect, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    transforms: dict[str, str] = field(default_factory=dict)
    transformed: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    failures: dict[str, str] = field(default_factory=dict)

    def reached(self) -> dict[str, set[str]]:
        """Return the storages that each tensor is written to, as it is or computed."""
        found: dict[str, set[str]] = defaultdict(set)
        for name, writes in self.writes.items():
            found[name] |= {write.storage for write in writes}
        for storage, names in self.transformed.items():
            for name in names:
                found[name].add(storage)
        return found


def trace_load(
    model: torch.nn.Module,
    standins: Mapping[str, torch.Tensor],
    storages: Mapping[str, torch.Tensor],
) -> Trace:
    """Run `model.load_weights` on meta stand-ins and record what it writes.

    Args:
        model: a vLLM model in load form.
        standins: contiguous meta tensors by checkpoint name, fed in this order.
        storages: the model's parameters and buffers by qualified name. Those not on meta are not
            written to.
    """
    trace = Trace()
    names = list(standins)
    watch = _Watch(standins, storages, trace)
    position = 0

    def feed() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal position
        while position < len(names):
            name = names[position]
            position += 1
            yield name, standins[name]

    while position < len(names):
        before = position
        try:
            with torch.no_grad(), watch:
                model.load_weights(feed())  # type: ignore[operator]
        # A loader may raise anything; what it raised is the reason in the plan.
        except Exception as error:  # noqa: BLE001
            name = names[max(position - 1, before)]
            said = str(error).partition("\n")[0]
            trace.failures[name] = f"the loader raises {type(error).__name__} {said}".rstrip()
            trace.writes.pop(name, None)
            position = max(position, before + 1)
    return trace


class _Watch(TorchDispatchMode):
    def __init__(
        self,
        standins: Mapping[str, torch.Tensor],
        storages: Mapping[str, torch.Tensor],
        trace: Trace,
    ) -> None:
        super().__init__()
        self._trace = trace
        self._loaded: dict[str, set[str]] = defaultdict(set)
        """Tensors that were copied to a storage; some may have been found to be computed since."""
        self._sources = {_identity(t): (name, t) for name, t in standins.items()}
        self._targets = {_identity(t): (name, t) for name, t in storages.items() if t.numel()}
        self._tainted: dict[int, frozenset[str]] = {}
        self._alive: list[torch.Tensor] = []  # an identity must not be reused while we watch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nobody compiles what is traced here, and to keep compilers out of each call takes a fifth of the time."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:  # of the same storage, so it is known for what it is a view of
            return func(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        target = self._targets.get(_identity(first)) if first is not None else None
        if target is None or first is None:
            out = func(*args, **kwargs)
            self._taint(out, args, kwargs)
            return out
        if func is _aten.copy_.default and isinstance(args[1], torch.Tensor):
            self._copy(target, first, args[1])
            return first
        if func in _FILLS and not any(isinstance(value, torch.Tensor) for value in args[1:]):
            value = 0.0 if func is _aten.zero_.default else float(args[1])
            self._fill(target, first, value)
            return first
        if func._schema.is_mutable:
            self._transform(target[0], self._names(args[1:]), f"the loader applies {func}")
            return first
        out = func(*args, **kwargs)
        self._taint(out, args, kwargs)
        return out

    def _copy(self, target: tuple[str, torch.Tensor], dst: torch.Tensor, src: torch.Tensor) -> None:
        storage, parameter = target
        source = self._sources.get(_identity(src))
        if source is None:
            names = self._tainted.get(_identity(src), frozenset())
            self._transform(storage, names, "the loader computes what it stores")
            return
        name, tensor = source
        write = _match(name, tensor, src, storage, parameter, dst)
        if write is None:
            self._transform(storage, {name}, "the loader's copy is not a rectangle")
            return
        self._trace.writes[name].append(write)
        self._loaded[storage].add(name)

    def _fill(self, target: tuple[str, torch.Tensor], dst: torch.Tensor, value: float) -> None:
        storage, parameter = target
        if not dst.numel():
            return  # padding that this worker does not have
        found = shown(Form.of(parameter), Form.of(dst))
        if found is None:
            self._transform(storage, (), "the loader fills what is not a rectangle")
            return
        earlier = (w for name in self._loaded[storage] for w in self._trace.writes.get(name, ()))
        if any(w.storage == storage and overlap(w.target, found[0]) for w in earlier):
            self._transform(storage, (), "the loader overwrites what it loaded")
            return
        self._trace.constants[storage].append((found[0], value))

    def _transform(self, storage: str, names: Any, reason: str) -> None:
        """The storage no longer holds pure copies: what was written to it goes by misc as well."""
        names = set(names) | self._written_to(storage)
        for name in names:
            self._trace.writes.pop(name, None)
            self._trace.transforms[name] = reason
        self._trace.transformed[storage] |= names

    def _written_to(self, storage: str) -> set[str]:
        writes = self._trace.writes
        names = self._loaded[storage]
        return {n for n in names if any(w.storage == storage for w in writes.get(n, ()))}

    def _names(self, args: Any) -> set[str]:
        found: set[str] = set()
        for tensor in _tensors(args):
            key = _identity(tensor)
            if key in self._sources:
                found.add(self._sources[key][0])
            found |= self._tainted.get(key, frozenset())
            if key in self._targets:
                storage = self._targets[key][0]
                found |= self._written_to(storage)
        return found

    def _taint(self, out: Any, args: Any, kwargs: dict[str, Any]) -> None:
        names: set[str] | None = None
        for tensor in _tensors((out,)):
            key = _identity(tensor)
            if key in self._sources or key in self._targets:
                continue
            if names is None:
                names = self._names((args, list(kwargs.values())))
            if names:
                self._tainted[key] = self._tainted.get(key, frozenset()) | names
                self._alive.append(tensor)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _identity(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _match(
    name: str,
    tensor: torch.Tensor,
    src: torch.Tensor,
    storage: str,
    parameter: torch.Tensor,
    dst: torch.Tensor,
) -> Write | None:
    into = Form.of(parameter), Form.of(dst)
    found = joined(Form.of(tensor), Form.of(src), *into)
    if found is None:
        return None
    source, target, strides = found
    return Write(name, source, storage, target, into[1].offset - into[0].offset, strides)
