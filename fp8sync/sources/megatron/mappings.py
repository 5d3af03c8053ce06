"""A Megatron-Bridge mapping at the module it speaks of, as a layout.

Mappings are told apart by their exact class: a subclass that does something of its own is another
mapping. What is not listed here is not a rectangle, or not known to be one: `why_no_boxes` says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fp8sync.sources.megatron import pieces
from fp8sync.sources.megatron.heads import Heads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fp8sync.sources.megatron.pieces import Layout, Run, Shape, Shard

__all__ = ["Site", "layout_of", "why_no_boxes"]

_HOME = "megatron.bridge.models.conversion.param_mapping"
_STACK = re.compile(r"(?P<experts>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)$")
_EXPERT = re.compile(r"local_experts\.(\d+)\.|\.(?:weight|bias)(\d+)$")


@dataclass(frozen=True, slots=True)
class Site:
    """A local parameter where a mapping applies.

    Args:
        mapping: resolved mapping of Megatron-Bridge, with its process groups.
        module: the module that owns the parameter; it tells how an `AutoMapping` divides.
        names: HF name, or names by role, of what the parameter holds.
        shape: local shape.
        divided_dim: the dim along which the parameter itself says that it is divided, if it does.
        vocabulary: rows of the HF tensor where the parameter is a (padded) vocabulary.
    """

    mapping: Any
    module: Any
    names: Any
    shape: Shape
    divided_dim: int | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, mapping: Any, module: Any, parameter: Any, vocabulary: int | None = None) -> Site:
        """Read a parameter's shape and partition attributes; never its elements."""
        divided = getattr(parameter, "tensor_model_parallel", False)
        dim = getattr(parameter, "partition_dim", None) if divided else None
        return cls(mapping, module, mapping.hf_param, tuple(parameter.shape), dim, vocabulary)

    @property
    def shard(self) -> Shard:
        """This rank's (index, count) in the grid that the parameter belongs to."""
        return self.mapping.tp_rank, self.mapping.tp_size


def layout_of(site: Site) -> Layout:
    """Say which rectangles of which HF tensors a local parameter holds.

    Raises:
        ValueError: what the mapping does is not a rectangle, or the shapes contradict it.
    """
    reason = why_no_boxes(site.mapping)
    if reason:
        raise ValueError(reason)
    return _READERS[type(site.mapping).__name__](site)


def why_no_boxes(mapping: Any) -> str:
    """Return why a mapping's tensors are no rectangles of its parameter; nothing if they are.

    Read off the mapping alone, so that every rank says the same, whether it has the parameter or not.
    """
    cls = type(mapping)
    name = cls.__name__
    if cls.__module__ != _HOME or name not in _READERS:
        return f"mapping class {cls.__module__}.{name} is not known to be boxes"
    if getattr(mapping, "permute_dims", None) is not None:
        return f"the mapping permutes dims {mapping.permute_dims}"
    if name in _STACKS:
        return _why_no_stack(mapping)
    return ""


def _why_no_stack(mapping: Any) -> str:
    kind = _STACKS[type(mapping).__name__]
    stack = _STACK.match(mapping.hf_param)
    if stack is None or stack["kind"] != kind:
        return f"a stack of experts named {mapping.hf_param}, expected ...experts.{kind}"
    return "the stack of experts is transposed" if mapping.transpose_on_export else ""


def _whole(site: Site) -> Layout:
    _check_division(site, None)
    return pieces.whole(site.names, site.shape)


def _column(site: Site) -> Layout:
    _check_division(site, 0)
    return pieces.rows(site.names, site.shape, site.shard, site.vocabulary)


def _row(site: Site) -> Layout:
    _check_division(site, 1)
    return pieces.columns(site.names, site.shape, site.shard)


def _auto(site: Site) -> Layout:
    return _BY_PARALLELISM[_parallelism(site.mapping, site.module)](site)


def _qkv(site: Site) -> Layout:
    return _fused(_heads(site).qkv(site.names["q"], site.names["k"], site.names["v"]), site)


def _kv(site: Site) -> Layout:
    return _fused(_heads(site).kv(site.names["k"], site.names["v"]), site)


def _qkvg(site: Site) -> Layout:
    heads, names = _heads(site), site.names
    if heads.gated:
        raise ValueError("the one gate of a head is repeated over the head's rows")
    gates = pieces.Run(names["g"], 0, heads.heads)
    return _fused([*heads.qkv(names["q"], names["k"], names["v"]), gates], site)


def _concatenated_qkv(site: Site) -> Layout:
    return _fused(_heads(site).concatenated_qkv(site.names), site)


def _gated(site: Site) -> Layout:
    _check_division(site, 0)
    _check_strips(site)
    return pieces.concatenated((site.names["gate"], site.names["up"]), site.shape, site.shard)


def _stacked(site: Site) -> Layout:
    """One expert of an HF stack, under the name that a checkpoint gives the expert alone."""
    return _auto(replace(site, names=f"{_of_stack(site)}.down_proj.weight"))


def _stacked_gated(site: Site) -> Layout:
    expert = _of_stack(site)
    names = {"gate": f"{expert}.gate_proj.weight", "up": f"{expert}.up_proj.weight"}
    return _gated(replace(site, names=names))


def _of_stack(site: Site) -> str:
    """Return `<prefix>.experts.<number>` for an expert of a stack `<prefix>.experts.<kind>`."""
    stack, expert = _STACK.match(site.names), _EXPERT.search(site.mapping.megatron_param)
    if stack is None or expert is None:
        raise ValueError(f"which expert of {site.names} it is cannot be read off its name")
    return f"{stack['experts']}.{expert[1] or expert[2]}"


def _heads(site: Site) -> Heads:
    return Heads.of(site.mapping._get_config(site.module))


def _fused(runs: Iterable[Run], site: Site) -> Layout:
    parallelism = _parallelism(site.mapping._tp_mapping, site.module)
    if parallelism == "row":
        raise ValueError("a fused projection that is divided along its columns")
    column = parallelism == "column"
    _check_division(site, 0 if column else None)
    return pieces.fused(runs, site.shape, site.shard if column else (0, 1))


def _parallelism(mapping: Any, module: Any) -> str:
    """Return "column", "row" or "replicated", as Megatron-Bridge itself decides it."""
    try:
        return str(mapping._detect_parallelism_type(module))
    except ValueError:
        kind = type(module).__name__
        raise ValueError(f"Megatron-Bridge cannot tell how a {kind} is divided") from None


def _check_division(site: Site, dim: int | None) -> None:
    """Refuse a parameter whose own attributes contradict the mapping."""
    if site.shard[1] > 1 and site.divided_dim not in (None, dim):
        told = "replicates it" if dim is None else f"divides it along dim {dim}"
        raise ValueError(
            f"the mapping {told}, the parameter is divided along dim {site.divided_dim}"
        )


def _check_strips(site: Site) -> None:
    """Refuse experts whose gate and up alternate, as some fused kernels want them; no mapping says so."""
    name = site.mapping.megatron_param
    option = "shared_expert" if ".shared_experts." in name else "mlp"
    option = f"moe_{option}_glu_interleave_size"
    rows = getattr(getattr(site.module, "config", None), option, None)
    if rows and "experts." in name:
        raise ValueError(f"gate and up alternate in strips of {rows} rows ({option})")


_BY_PARALLELISM: dict[str, Callable[[Site], Layout]] = {
    "column": _column,
    "row": _row,
    "replicated": _whole,
}
_STACKS = {"FusedExpertMapping": "down_proj", "FusedGatedExpertMapping": "gate_up_proj"}
_READERS: dict[str, Callable[[Site], Layout]] = {
    "AutoMapping": _auto,
    "ColumnParallelMapping": _column,
    "ConcatenatedQKVMapping": _concatenated_qkv,
    "DirectMapping": _whole,
    "FusedExpertMapping": _stacked,
    "FusedGatedExpertMapping": _stacked_gated,
    "GatedMLPMapping": _gated,
    "KVMapping": _kv,
    "QKVGMapping": _qkvg,
    "QKVMapping": _qkv,
    "ReplicatedMapping": _whole,
    "RowParallelMapping": _row,
}
