"""A trainer's layout: Megatron's parallel axes, or FSDP over the data-parallel axis.

Dense and expert parameters live in two rank grids over the same ranks: tp × cp × dp and
etp × ep × edp within each pipeline stage. Replicas differ in cp and dp (or edp).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from fp8sync.errors import UnsupportedLayout
from fp8sync.layouts.grid import Grid, check_sizes, stage_of_layer
from fp8sync.layouts.models import Role
from fp8sync.layouts.pieces import Piece, chunks, even_split, piece_of_matrix
from fp8sync.manifest import TensorInfo
from fp8sync.recipe import BLOCK, Encoding, Formula

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from fp8sync.layouts.models import ModelShape, TensorShape

__all__ = ["TrainerLayout"]

_FUSED = {
    Role.QUERY: "linear_qkv",
    Role.KEY: "linear_qkv",
    Role.VALUE: "linear_qkv",
    Role.GATE: "linear_fc1",
    Role.UP: "linear_fc1",
}
_ROWS = {Role.COLUMN, Role.QUERY, Role.KEY, Role.VALUE, Role.GATE, Role.UP, Role.VOCABULARY}
_COLUMNS = {Role.ROW, Role.DOWN}
_DOWN = {Role.QUERY_DOWN, Role.KV_DOWN}
_Run = tuple[int, int, int, str, tuple[int, ...], int]
"""(dim, start, length, storage, local shape, position along dim in it)."""


@dataclass(frozen=True)
class TrainerLayout:
    """How a trainer spreads a model.

    Args:
        tp, cp, dp, pp: axes of the dense grid; their product is the number of ranks.
        ep, etp: expert and expert-tensor axes; `etp` 0 means as `tp`.
        vpp: virtual stages per pipeline stage.
        stages: layers of each virtual stage in the order of the layers; empty: as even as can be.
        fsdp: size of the axis within dp along which parameters are sharded, 1 for none; the rest
            of dp replicates. Parameters then carry their HF names, unfused.
        fsdp_dim: the dim that is sharded, as `torch.chunk` cuts; vectors always in dim 0.
        fused: Megatron's fused QKV (by query group) and gate-up storages.
        cut_down: split MLA's down projections by rows over tp, as Megatron's local spec does.
        order: axes of the dense grid, fastest first, as Megatron names them.
        pairs: the formula, if linear weights are primary FP8 pairs.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 0
    vpp: int = 1
    stages: tuple[int, ...] = ()
    fsdp: int = 1
    fsdp_dim: int = 0
    fused: bool = True
    cut_down: bool = False
    order: str = "tp-cp-ep-dp-pp"
    pairs: Formula | None = None

    def __post_init__(self) -> None:
        axes = "tp", "cp", "dp", "pp", "ep", "vpp", "fsdp"
        check_sizes({axis: getattr(self, axis) for axis in axes})
        check_sizes({"etp": self.etp, "fsdp_dim": self.fsdp_dim}, 0)
        check_sizes({f"stages[{i}]": n for i, n in enumerate(self.stages)}, 0)
        within = self.tp * self.cp * self.dp
        expert_tp = self.etp or self.tp
        faults = []
        if within % (expert_tp * self.ep):
            faults.append(
                f"tp*cp*dp = {within} ranks of a stage are no multiple of etp*ep = "
                f"{expert_tp}*{self.ep}"
            )
        if self.dp % self.fsdp:
            faults.append(f"dp = {self.dp} is no multiple of fsdp = {self.fsdp}")
        if sorted(self.order.split("-")) != sorted(["tp", "cp", "ep", "dp", "pp"]):
            faults.append(f"order {self.order!r} does not name tp, cp, ep, dp and pp once each")
        if faults:
            raise UnsupportedLayout("this trainer layout does not exist", faults)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    @cached_property
    def dense(self) -> Grid:
        """The grid of dense parameters."""
        sizes = {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}
        return Grid(tuple((a, sizes[a]) for a in self.order.split("-") if a in sizes))

    @cached_property
    def expert(self) -> Grid:
        """The grid of expert parameters; `dp` there is the expert-data-parallel axis."""
        tp = self.etp or self.tp
        data = self.tp * self.cp * self.dp // (tp * self.ep)
        sizes = {"tp": tp, "ep": self.ep, "dp": data, "pp": self.pp}
        return Grid(tuple((a, sizes[a]) for a in self.order.split("-") if a in sizes))

    def infos(self, model: ModelShape) -> list[TensorInfo]:
        """Return the model's tensors as the trainer holds them."""
        return [
            TensorInfo(t.name, t.shape, "float8_e4m3fn", Encoding.BLOCKWISE, self.pairs)
            if self.pairs and t.linear
            else TensorInfo(t.name, t.shape, t.dtype)
            for t in model.tensors
        ]

    def pieces(self, tensor: TensorShape, model: ModelShape) -> list[Piece]:
        """Return where a tensor of the model lies.

        Raises:
            UnsupportedLayout: a dim that does not divide, or stages that are not the model's layers.
        """
        homes = self._homes(tensor, model)
        return [p for home in homes for p in self._at(tensor, model, home)]

    def alike(self, tensor: TensorShape, model: ModelShape) -> Hashable:
        """Return a key: tensors with the same key lie alike, in storages of their own."""
        owner = None if tensor.expert is None else tensor.expert * self.ep // model.experts
        return tensor.role, tensor.shape, self._homes(tensor, model), owner

    def _homes(self, tensor: TensorShape, model: ModelShape) -> tuple[int, ...]:
        stages = self.stages or even_split(model.layers, self.pp * self.vpp)
        if len(stages) != self.pp * self.vpp or sum(stages) != model.layers:
            raise UnsupportedLayout(
                f"stages {stages}: expected {self.pp}*{self.vpp} stages of {model.layers} layers"
            )
        home, last = stage_of_layer(stages, tensor.layer) % self.pp, (len(stages) - 1) % self.pp
        if model.tied and tensor.role is Role.VOCABULARY and home != last:
            return home, last  # the last stage has a copy of its own
        return (home,)

    def _at(self, tensor: TensorShape, model: ModelShape, home: int) -> Iterator[Piece]:
        grid, fixed, local = self.dense, {"pp": home}, -1
        if tensor.expert is not None:
            if model.experts % self.ep:
                raise UnsupportedLayout(f"{model.experts} experts on ep = {self.ep} ranks")
            owner, local = divmod(tensor.expert, model.experts // self.ep)
            grid, fixed = self.expert, {"pp": home, "ep": owner}
        tp, data = dict(grid.axes)["tp"], dict(grid.axes)["dp"]
        split = tp > 1 and tensor.role in (_ROWS | _COLUMNS | (_DOWN if self.cut_down else set()))
        for number in range(tp if split else 1):
            place = {**fixed, "tp": number} if split else fixed
            for run in self._runs(tensor, model, tp if split else 1, number, local):
                if self.fsdp == 1:
                    yield self._piece(tensor, run, grid.ranks(**place))
                else:
                    shards = data if self.fsdp == self.dp else self.fsdp
                    yield from self._shards(tensor, run, grid, place, shards)

    def _shards(
        self, tensor: TensorShape, run: _Run, grid: Grid, place: dict[str, int], shards: int
    ) -> Iterator[Piece]:
        data = dict(grid.axes)["dp"]
        if data % shards:
            raise UnsupportedLayout(f"{tensor.name}: {data} data-parallel ranks, {shards} shards")
        dim = min(self.fsdp_dim, len(tensor.shape) - 1)
        cut, start, length, storage, local, _ = run
        low, whole = (start, length) if cut == dim else (0, tensor.shape[dim])
        for shard, (first, size) in enumerate(chunks(whole, shards)):
            if not size:
                continue
            ranks = tuple(
                sorted(
                    r
                    for replica in range(data // shards)
                    for r in grid.ranks(**place, dp=replica * shards + shard)
                )
            )
            mine = tuple(size if d == dim else n for d, n in enumerate(local))
            piece = self._piece(tensor, (dim, low + first, size, storage, mine, 0), ranks)
            if cut != dim:
                piece = _with_origin(_within(piece, cut, start, length), [0] * len(tensor.shape))
            yield piece

    def _runs(
        self, tensor: TensorShape, model: ModelShape, tp: int, number: int, expert: int
    ) -> Iterator[_Run]:
        """Yield what tensor-parallel rank `number` holds, before any sharding."""
        fused = self.fused and self.fsdp == 1
        if fused and tensor.role in {Role.QUERY, Role.KEY, Role.VALUE}:
            yield from _query_groups(tensor, model, tp, number)
            return
        storage = tensor.name
        if tensor.role in _COLUMNS:
            size = _divided(tensor, 1, tp)
            yield 1, number * size, size, storage, (tensor.shape[0], size), 0
            return
        if tensor.role is Role.VOCABULARY:
            padded = -(-tensor.shape[0] // (128 * tp)) * 128
            size = max(0, min(padded, tensor.shape[0] - number * padded))
            if size:
                yield 0, number * padded, size, storage, (padded, tensor.shape[1]), 0
            return
        size = _divided(tensor, 0, tp)
        local: tuple[int, ...] = (size, *tensor.shape[1:])
        at = 0
        if fused and tensor.role in {Role.GATE, Role.UP}:
            storage = _fused_name(tensor, expert)
            local, at = (2 * size, *tensor.shape[1:]), size * (tensor.role is Role.UP)
        yield 0, number * size, size, storage, local, at

    def _piece(self, tensor: TensorShape, run: _Run, ranks: tuple[int, ...]) -> Piece:
        dim, start, length, storage, local, at = run
        scales = bool(self.pairs and tensor.linear)
        span = dim, start, length
        piece = piece_of_matrix(tensor, span, storage, local, at, ranks, scales=scales)
        return _with_origin(piece, [at if d == dim else 0 for d in range(len(tensor.shape))])


def _query_groups(tensor: TensorShape, model: ModelShape, tp: int, number: int) -> Iterator[_Run]:
    """Yield runs of the fused rows [q..., k, v] of every group that lie on a rank.

    With fewer groups than ranks a rank's rows begin or end inside a group.
    """
    rows, repeat = model.head_dim, model.heads // model.kv_heads
    group = (repeat + 2) * rows
    each = _whole(tensor, group * model.kv_heads, tp)
    first, last = number * each, (number + 1) * each
    before = {Role.QUERY: 0, Role.KEY: repeat, Role.VALUE: repeat + 1}[tensor.role] * rows
    size = rows * (repeat if tensor.role is Role.QUERY else 1)
    storage = _fused_name(tensor, -1)
    for g in range(model.kv_heads):
        low, high = max(first, g * group + before), min(last, g * group + before + size)
        if low < high:
            start = g * size + low - (g * group + before)
            yield 0, start, high - low, storage, (each, *tensor.shape[1:]), low - first


def _fused_name(tensor: TensorShape, expert: int) -> str:
    if expert < 0:
        prefix, _, kind = tensor.name.rsplit(".", 2)
        return f"{prefix}.{_FUSED[tensor.role]}.{kind}"
    return f"{tensor.name.rsplit('.', 3)[0]}.{_FUSED[tensor.role]}.weight{expert}"


def _divided(tensor: TensorShape, dim: int, parts: int) -> int:
    return _whole(tensor, tensor.shape[dim], parts)


def _whole(tensor: TensorShape, length: int, parts: int) -> int:
    if length % parts:
        raise UnsupportedLayout(f"{tensor.name}: {length} does not divide by {parts} ranks")
    return length // parts


def _within(piece: Piece, dim: int, start: int, length: int) -> Piece:
    """Narrow a shard, cut along one dim, to what tensor parallelism left of the other."""
    box = piece.box
    first = tuple(start if d == dim else a for d, a in enumerate(box.start))
    shape = tuple(length if d == dim else n for d, n in enumerate(box.shape))
    return replace(piece, box=replace(box, start=first, shape=shape))


def _with_origin(piece: Piece, local: Sequence[int]) -> Piece:
    """Say where a pair's blocks begin that lies at `local` in its storage.

    Transformer Engine's begin at the local storage's first element, in every dim.
    """
    box = piece.box
    within = zip(local, box.start, strict=True)
    if box.scale_at is None or all((a - b) % BLOCK == 0 for a, b in within):
        return piece
    return replace(piece, box=replace(box, scale_origin=tuple(n % BLOCK for n in local)))
