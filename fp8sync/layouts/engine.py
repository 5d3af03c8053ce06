"""An engine's layout: vLLM's tensor, expert, data and pipeline parallelism.

Real engines are traced; this description is for planning without one. It follows vLLM's rules for
fused parameters, KV-head replicas, vocabulary padding and the dealing of experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from fp8sync.errors import UnsupportedLayout
from fp8sync.layouts.grid import Grid, check_sizes, stage_of_layer
from fp8sync.layouts.models import Role
from fp8sync.layouts.pieces import Piece, even_split, piece_of_matrix
from fp8sync.manifest import TensorInfo
from fp8sync.plan.boxes import misaligned_dim, span
from fp8sync.plan.formats import MISC
from fp8sync.recipe import BLOCK, Encoding, Formula

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from fp8sync.layouts.models import ModelShape, TensorShape

__all__ = ["EngineLayout"]

_VOCABULARY_UNIT = 64
_FUSED = {
    Role.QUERY: "qkv_proj",
    Role.KEY: "qkv_proj",
    Role.VALUE: "qkv_proj",
    Role.GATE: "gate_up_proj",
    Role.UP: "gate_up_proj",
    Role.QUERY_DOWN: "fused_qkv_a_proj",
    Role.KV_DOWN: "fused_qkv_a_proj",
}
_ATTENTION = {Role.QUERY, Role.KEY, Role.VALUE}


@dataclass(frozen=True)
class EngineLayout:
    """How vLLM spreads a model.

    Args:
        tp, pp, dp: an engine's axes; a rank is `(dp * pp_size + pp) * tp_size + tp`.
        expert_parallel: deal whole experts over the tp*dp ranks of a stage; otherwise each expert is
            cut over them.
        round_robin: deal experts in turn instead of in runs.
        engines: equal engines fed together.
        stages: layers of each pipeline stage; empty: vLLM's own split.
        formula: what the FP8 kernels keep; None for an engine that holds no FP8.
        scales: False for an engine that stores blockwise weights dequantized.
        misc: names of tensors that only the engine's own loader can take, with the reason.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    expert_parallel: bool = False
    round_robin: bool = False
    engines: int = 1
    stages: tuple[int, ...] = ()
    formula: Formula | None = Formula.POW2
    scales: bool = True
    misc: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_sizes({axis: getattr(self, axis) for axis in ("tp", "pp", "dp", "engines")})
        check_sizes({f"stages[{i}]": n for i, n in enumerate(self.stages)}, 0)

    @property
    def ranks(self) -> int:
        """Number of ranks of all engines together."""
        return self.tp * self.pp * self.dp * self.engines

    @cached_property
    def grid(self) -> Grid:
        """The rank grid of all engines."""
        return Grid((("tp", self.tp), ("pp", self.pp), ("dp", self.dp), ("engine", self.engines)))

    @cached_property
    def _reasons(self) -> dict[tuple[ModelShape, Role, tuple[int, ...], bool], str]:
        return {}

    def infos(self, model: ModelShape) -> list[TensorInfo]:
        """Return the model's tensors as the engine wants them."""
        return [self._info(t, self._reason(t, model)) for t in model.tensors]

    def pieces(self, tensor: TensorShape, model: ModelShape) -> list[Piece]:
        """Return where a tensor of the model lies: whole in a storage apart, if it is on the misc path.

        Raises:
            UnsupportedLayout: a dim that does not divide, or fused parts whose scales would collide.
        """
        pieces = self._pieces_of(tensor, model)
        if not self._reason(tensor, model):
            return pieces
        ranks = tuple(sorted({r for p in pieces for r in p.ranks}))
        span_ = 0, 0, tensor.shape[0]
        scales = self._quantized(tensor) and self.scales
        name = MISC + tensor.name
        return [piece_of_matrix(tensor, span_, name, tensor.shape, 0, ranks, scales=scales)]

    def alike(self, tensor: TensorShape, model: ModelShape) -> Hashable:
        """Return a key: tensors with the same key lie alike, in storages of their own."""
        owner = None if tensor.expert is None else -1  # -1: every rank has a part of each expert
        if tensor.expert is not None and self.expert_parallel:
            owner = self._deal(model.experts)[tensor.expert][0]
        reason = self._reason(tensor, model)
        return tensor.role, tensor.shape, self._homes(tensor, model), owner, reason

    def _reason(self, tensor: TensorShape, model: ModelShape) -> str:
        """Why a tensor is on the misc path; no loader can cut scales where a part cuts a block."""
        told = dict(self.misc).get(tensor.name) if self.misc else None
        if told or not self._quantized(tensor):
            return told or ""
        key = model, tensor.role, tensor.shape, tensor.expert is None
        found = self._reasons.get(key)
        if found is None:
            found = ""
            for piece in self._pieces_of(tensor, model):
                rect = piece.box.start, piece.box.shape
                if (dim := misaligned_dim(rect, tensor.shape)) is not None:
                    found = f"engine rank {piece.ranks[0]} takes {span(rect)}: cuts dim {dim}"
                    break
            self._reasons[key] = found
        return found

    def _quantized(self, tensor: TensorShape) -> bool:
        return self.formula is not None and tensor.linear

    def _info(self, t: TensorShape, reason: str) -> TensorInfo:
        if not self._quantized(t):
            return TensorInfo(t.name, t.shape, t.dtype, misc=reason)
        dtype = "float8_e4m3fn" if self.scales else t.dtype
        return TensorInfo(t.name, t.shape, dtype, Encoding.BLOCKWISE, self.formula, reason)

    def _homes(self, tensor: TensorShape, model: ModelShape) -> tuple[int, ...]:
        stages = self.stages or _vllm_stages(model.layers, self.pp)
        if len(stages) != self.pp or sum(stages) != model.layers:
            raise UnsupportedLayout(
                f"stages {stages}: expected {self.pp} stages of {model.layers} layers"
            )
        home = stage_of_layer(stages, tensor.layer)
        if model.tied and tensor.role is Role.VOCABULARY and self.pp > 1:
            return home, self.pp - 1
        return (home,)

    def _pieces_of(self, tensor: TensorShape, model: ModelShape) -> list[Piece]:
        homes = self._homes(tensor, model)
        return [p for home in homes for p in self._at(tensor, model, home)]

    def _at(self, tensor: TensorShape, model: ModelShape, home: int) -> Iterator[Piece]:
        if tensor.expert is not None:
            yield from self._expert_pieces(tensor, model, home)
        elif tensor.role in _ATTENTION:
            yield from self._head_pieces(tensor, model, home)
        elif tensor.role is Role.VOCABULARY:
            unit = math.lcm(_VOCABULARY_UNIT, self.tp)
            size = -(-tensor.shape[0] // unit) * unit // self.tp
            for tp in range(self.tp):
                real = max(0, min(size, tensor.shape[0] - tp * size))
                if real:
                    span_ = 0, tp * size, real
                    ranks = self.grid.ranks(tp=tp, pp=home)
                    local = size, tensor.shape[1]
                    yield piece_of_matrix(tensor, span_, tensor.name, local, 0, ranks)
        else:
            yield from self._linear_pieces(tensor, model, home)

    def _linear_pieces(self, tensor: TensorShape, model: ModelShape, home: int) -> Iterator[Piece]:
        dim = 1 if tensor.role in {Role.ROW, Role.DOWN} else 0
        split = tensor.role in {Role.ROW, Role.DOWN, Role.COLUMN, Role.GATE, Role.UP}
        parts = self.tp if split else 1
        size = _divided(tensor, dim, parts)
        local = tuple(size if d == dim else n for d, n in enumerate(tensor.shape))
        storage, at, scale_rows = tensor.name, 0, {}
        if tensor.role in {Role.GATE, Role.UP}:
            storage, at = _fused_name(tensor), size * (tensor.role is Role.UP)
            local = 2 * size, *local[1:]
            scale_rows = self._scale_rows(tensor, [size, size])
        elif tensor.role in {Role.QUERY_DOWN, Role.KV_DOWN} and model.q_lora_rank:
            rows = [model.q_lora_rank, model.kv_lora_rank + model.rope_dim]
            storage, at = _fused_name(tensor), rows[0] * (tensor.role is Role.KV_DOWN)
            local = sum(rows), *local[1:]
            scale_rows = self._scale_rows(tensor, rows)
        for tp in range(parts):
            place = {"tp": tp, "pp": home} if split else {"pp": home}
            yield piece_of_matrix(
                tensor,
                (dim, tp * size, size),
                storage,
                local,
                at,
                self.grid.ranks(**place),
                scale_rows=scale_rows,
                scales=self._quantized(tensor) and self.scales,
            )

    def _head_pieces(self, tensor: TensorShape, model: ModelShape, home: int) -> Iterator[Piece]:
        query = _whole(tensor, model.heads, self.tp) * model.head_dim
        kept = max(1, model.kv_heads // self.tp)
        shared = max(1, self.tp // model.kv_heads)
        if kept * self.tp != model.kv_heads * shared:
            raise UnsupportedLayout(
                f"{tensor.name}: {model.kv_heads} KV heads on {self.tp} ranks of an engine"
            )
        rows = [query, kept * model.head_dim, kept * model.head_dim]
        number = [Role.QUERY, Role.KEY, Role.VALUE].index(tensor.role)
        local = sum(rows), *tensor.shape[1:]
        at, size = sum(rows[:number]), rows[number]
        scale_rows = self._scale_rows(tensor, rows)
        holders: dict[int, list[int]] = defaultdict(list)
        for tp in range(self.tp):
            turn = tp if tensor.role is Role.QUERY else tp // shared
            holders[turn * size] += self.grid.ranks(tp=tp, pp=home)
        for start, ranks in holders.items():
            yield piece_of_matrix(
                tensor,
                (0, start, size),
                _fused_name(tensor),
                local,
                at,
                tuple(sorted(ranks)),
                scale_rows=scale_rows,
                scales=self._quantized(tensor) and self.scales,
            )

    def _expert_pieces(self, tensor: TensorShape, model: ModelShape, home: int) -> Iterator[Piece]:
        expert = tensor.expert or 0
        across = self.tp * self.dp
        down = tensor.role is Role.DOWN
        dim = 1 if down else 0
        prefix = tensor.name.rsplit(".", 3)[0]
        storage = f"{prefix}.{'w2_weight' if down else 'w13_weight'}"
        if self.expert_parallel:
            owner, slot = self._deal(model.experts)[expert]
            places = [(owner, 0, tensor.shape[dim])]
        else:
            size = _divided(tensor, dim, across)
            places, slot = [(i, i * size, size) for i in range(across)], expert
        for owner, start, size in places:
            ranks = self.grid.ranks(tp=owner % self.tp, dp=owner // self.tp, pp=home)
            local = (tensor.shape[0], size) if down else (2 * size, tensor.shape[1])
            at = size * (tensor.role is Role.UP)
            blocks = math.prod(-(-n // BLOCK) for n in local)
            base = slot * math.prod(local), slot * blocks
            rows = {} if down else self._scale_rows(tensor, [size, size])
            yield piece_of_matrix(
                tensor,
                (dim, start, size),
                storage,
                local,
                at,
                ranks,
                base=base,
                scale_rows=rows,
                scales=self._quantized(tensor) and self.scales,
            )

    def _deal(self, experts: int) -> tuple[tuple[int, int], ...]:
        """Return (owner, slot) of every expert; the first `experts % ranks` ranks get one more."""
        return _deal(experts, self.tp * self.dp, self.round_robin)

    def _scale_rows(self, tensor: TensorShape, rows: list[int]) -> dict[int, int]:
        """Return the block row at which each fused part's scales begin: vLLM rounds offsets up."""
        if not (self._quantized(tensor) and self.scales):
            return {}
        if any(n % BLOCK for n in rows[:-1]):
            raise UnsupportedLayout(
                f"{tensor.name}: the engine fuses parts of {rows} rows; all but the last must be "
                f"multiples of {BLOCK}, or their scales collide"
            )
        return {sum(rows[:i]): sum(-(-n // BLOCK) for n in rows[:i]) for i in range(len(rows))}


@lru_cache(maxsize=64)
def _deal(experts: int, ranks: int, round_robin: bool) -> tuple[tuple[int, int], ...]:
    if round_robin:
        return tuple((e % ranks, e // ranks) for e in range(experts))
    counts = even_split(experts, ranks)
    return tuple((owner, slot) for owner, count in enumerate(counts) for slot in range(count))


@lru_cache(maxsize=64)
def _vllm_stages(layers: int, parts: int) -> tuple[int, ...]:
    """Split layers as vLLM does: what is left over goes to the last stages but one."""
    size, more = divmod(layers, parts)
    stages = [size] * parts
    for i in range(2, more + 2):
        stages[-i] += 1
    return tuple(stages)


def _fused_name(tensor: TensorShape) -> str:
    prefix, _, kind = tensor.name.rsplit(".", 2)
    return f"{prefix}.{_FUSED[tensor.role]}.{kind}"


def _divided(tensor: TensorShape, dim: int, parts: int) -> int:
    return _whole(tensor, tensor.shape[dim], parts)


def _whole(tensor: TensorShape, length: int, parts: int) -> int:
    if length % parts:
        raise UnsupportedLayout(f"{tensor.name}: {length} does not divide by {parts} ranks")
    return length // parts
