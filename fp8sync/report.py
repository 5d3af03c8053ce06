"""What a refit did, as values."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from fp8sync.recipe import Encoding

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from fp8sync.manifest import TensorInfo
    from fp8sync.payload import PartReport
    from fp8sync.plan import Plan

__all__ = ["RefitReport", "TensorReport", "tensor_reports"]


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a refit.

    Args:
        name: HF parameter name.
        route: `bulk` or `misc`.
        reason: why it took the misc path; empty on bulk.
        encoding: `plain` or `blockwise`.
        formula: `pow2` or `fp32`; empty for plain tensors.
        bytes: sent to all engine workers together, scales included.
        error: relative Frobenius error of quantization, ‖dequantized - w‖ / ‖w‖; 0.0 for plain, NaN
            where it was not measured (transport `ipc`).
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
        bytes_sent: payload and headers, to all workers together.
        seconds: wall seconds per stage: `quantize` and `send` (of the slowest trainer rank), `verify`
            (until every worker had compared digests), `prepare`, `commit` and `total`.
        pause_s: how long the engine could not generate: vLLM's `update_weights` and
            `finish_weight_update`, as the caller sees them.
    """

    version: int
    bytes_sent: int
    seconds: Mapping[str, float]
    pause_s: float
    _plan: Plan = field(repr=False, compare=False)
    _parts: tuple[PartReport, ...] = field(repr=False, compare=False)
    _ranks: frozenset[int] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def tensors(self) -> tuple[TensorReport, ...]:
        """One entry per tensor of the plan; made when first asked for."""
        return tensor_reports(self._plan, self._parts, self._ranks)


def tensor_reports(
    plan: Plan, parts: Iterable[PartReport], source_ranks: Container[int] | None = None
) -> tuple[TensorReport, ...]:
    """Join the plan with what packing showed; of the copies of `source_ranks` alone if given."""
    errors: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in parts:
        errors[part.tensor][0] += part.error_sq
        errors[part.tensor][1] += part.norm_sq
    sent: Counter[str] = Counter()
    for copy in plan.copies:
        if source_ranks is not None and copy.source_rank not in source_ranks:
            continue
        sent[copy.tensor] += copy.weight_bytes + 4 * math.prod(copy.scale_shape)
    return tuple(
        TensorReport(
            name=info.name,
            route="misc" if info.misc else "bulk",
            reason=info.misc,
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
