"""What a refit did, as values."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, overload

from fp8sync.recipe import Encoding

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from fp8sync.manifest import TensorInfo
    from fp8sync.plan import Plan
    from fp8sync.wire.payload import PartReport

__all__ = ["LazyTensorReports", "RefitReport", "TensorReport"]


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a refit.

    Args:
        name: HF parameter name.
        route: `bulk`, `misc`, or `left out` where the engine knowingly takes nothing of it.
        reason: why it took the misc path, or was left out; empty on bulk.
        encoding: `plain` or `blockwise`.
        formula: `pow2` or `fp32`; empty for plain tensors.
        bytes: taken by all engine workers together, scales included, whoever sent them.
        error: relative Frobenius error of quantization, ‖dequantized - w‖ / ‖w‖; 0.0 for plain, NaN
            where it was not measured: on every transport but `gloo`, and of FP8 pairs passed through.

    Examples:
        >>> sorted(report.tensors, key=lambda t: t.bytes)[-1].name  # doctest: +SKIP
        'model.embed_tokens.weight'
    """

    name: str
    route: str
    reason: str
    encoding: str
    formula: str
    bytes: int
    error: float


@dataclass(frozen=True)
class RefitReport:
    """One refit that was committed.

    Args:
        version: 1 for a link's first refit.
        bytes_sent: payload and headers, from trainer ranks to all workers together.
        seconds: wall seconds per stage: `quantize` and `send` (of the slowest trainer rank), `verify`
            (until every worker had compared digests), `forward` (until workers had handed on to one
            another what several of them want), `drain` (until requests in flight had ended or were
            frozen; the last outputs of an `AsyncLLM` are given up to 20 ms), `prepare`, `commit` and `total`.
        pause_s: how long the engine stood still, as the caller measured it: from the call of pause (with
            `wait`, from vLLM's word that nothing is stepped) to the answer to resume, installing and caches
            included; of several engines, from the first that stands. Of an engine that need not be paused
            (`keep`), as its slowest worker measured it: from where its last step ended, or if none was under way
            from where it was called, to where its GPU had installed all. What its scheduler does beside that,
            and the way of the answers, is no part of it.
        tensors: one entry per tensor of the trainer.
        weight_version: what the engine calls its weights from now on, of whatever link: the number after
            its last one (vLLM keeps such a label from 0.27 on, and puts it on every output from 0.32 on), None
            where it cannot tell.
        host_s: seconds in which this rank's calling thread neither waited (for a GPU, the wire, a peer,
            vLLM) nor, on a trainer without a GPU, quantized.

    Examples:
        >>> report = fp8sync.refit(model, llm)  # doctest: +SKIP
        >>> report.pause_s, [t.name for t in report.tensors if t.route == "misc"]  # doctest: +SKIP
        (0.022, [])
    """

    version: int
    bytes_sent: int
    seconds: Mapping[str, float]
    pause_s: float
    tensors: Sequence[TensorReport] = field(repr=False)
    weight_version: str | None = None
    host_s: float = math.nan


class LazyTensorReports(Sequence[TensorReport]):
    """The plan joined with what packing showed, made when first read: it is large and seldom read.

    Args:
        plan: the agreed plan.
        parts: of all ranks, or of `source_ranks`.
        source_ranks: count the bytes of these ranks alone.
    """

    def __init__(
        self,
        plan: Plan,
        parts: Sequence[PartReport],
        source_ranks: Container[int] | None = None,
    ) -> None:
        self._plan, self._parts, self._ranks = plan, parts, source_ranks

    @cached_property
    def _made(self) -> tuple[TensorReport, ...]:
        return _tensor_reports(self._plan, self._parts, self._ranks)

    def __len__(self) -> int:
        return len(self._plan.tensors)

    @overload
    def __getitem__(self, index: int) -> TensorReport: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TensorReport]: ...
    def __getitem__(self, index: int | slice) -> TensorReport | Sequence[TensorReport]:
        return self._made[index]


def _tensor_reports(
    plan: Plan, parts: Iterable[PartReport], source_ranks: Container[int] | None
) -> tuple[TensorReport, ...]:
    errors: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in parts:
        errors[part.tensor][0] += part.error_sq
        errors[part.tensor][1] += part.norm_sq
    sent: Counter[str] = Counter()
    for copy in plan.copies:
        if source_ranks is not None and (
            copy.via is not None or copy.source_rank not in source_ranks
        ):
            continue
        sent[copy.tensor] += copy.weight_bytes + 4 * math.prod(copy.scale_shape)
    return tuple(
        TensorReport(
            name=info.name,
            route="left out" if info.unused else "misc" if info.misc else "bulk",
            reason=info.unused or info.misc,
            encoding=info.encoding.value,
            formula=info.formula.value if info.formula else "",
            bytes=sent[info.name],
            error=_relative(info, *errors[info.name]),
        )
        for info in plan.tensors.values()
    )


def _relative(info: TensorInfo, error_sq: float, norm_sq: float) -> float:
    if info.encoding is Encoding.PLAIN:
        return 0.0
    return math.sqrt(error_sq / norm_sq) if norm_sq else math.nan
