"""Percentile, margin, and the largest of all ranks: from tokens' amax to scales."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fp8sync.calibrate.attended import largest_attended
from fp8sync.calibrate.cached import largest_cached
from fp8sync.errors import NonFiniteWeight
from fp8sync.trainers import exchange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["calibrate_kv"]

_E4M3_MAX = 448.0


@torch.no_grad()
def calibrate_kv(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor] | torch.Tensor],
    *,
    percentile: float = 100.0,
    margin: float = 1.0,
    bridge: Any = None,
) -> dict[str, torch.Tensor]:
    """Return KV-cache scales for `fp8sync.refit(..., kv_scales=...)`.

    A scale is `percentile of amax * margin / 448`, where amax is taken over the heads and elements of one
    token, and the percentile over all tokens. It is rounded up to a BF16 value, which vLLM's first load
    and its reload keep alike. On a trainer of several ranks every rank calls this, with batches of its
    own; all get the largest of each layer. Of a Megatron-Core model, tensor-parallel ranks and pipeline
    stages are given the same batches.

    Args:
        model: a Hugging Face causal language model; with a bridge, a Megatron-Core model: the list of its
            chunks on this rank.
        batches: each `input_ids` [batch, length], or the keyword arguments of a forward pass. Tokens
            that `attention_mask` hides are not counted. Of a Megatron-Core model `input_ids` and
            `attention_mask` [batch, length] are read, and only the end of a sequence may be hidden.
        percentile: of the tokens' amax, 0 to 100; what lies above saturates.
        margin: for tokens larger than any seen here.
        bridge: the `megatron.bridge.AutoBridge` of a Megatron-Core model.

    Returns:
        By vLLM's parameter name, `<attention module>.attn.k_scale` and `.v_scale`: float32 scalars on
        the CPU, of all layers on every rank.

    Raises:
        ValueError: no batches, or a percentile or margin that makes no sense.
        UnsupportedLayout: the model's cache holds no keys and values per head.
        NonFiniteWeight: NaN or Inf in keys or values.

    Examples:
        >>> scales = fp8sync.calibrate_kv(model, [input_ids])  # doctest: +SKIP
        >>> fp8sync.refit(model, llm, kv_scales=scales)  # doctest: +SKIP
    """
    if not 0 < percentile <= 100 or not 0 < margin < math.inf:
        raise ValueError(f"percentile {percentile} is not in (0, 100], or margin {margin} <= 0")
    if bridge is None:
        tokens = largest_cached(model, _given(batches))
    else:
        chunks = model if isinstance(model, (list, tuple)) else [model]
        tokens = largest_attended(chunks, bridge, _given(batches))
    # torch's quantile takes 16 million values at most.
    own = {name: float(np.quantile(t.numpy(), percentile / 100)) for name, t in tokens.items()}
    amax: dict[str, float] = {}
    for told in exchange(own):
        for name, value in told.items():
            amax[name] = max(value, amax.get(name, 0.0))
    if not amax:
        raise ValueError("no batches to calibrate with")
    if bad := [f"{n}: amax {value}" for n, value in amax.items() if not math.isfinite(value)]:
        raise NonFiniteWeight("NaN or Inf in keys or values", bad)
    names = sorted(amax)
    scales = _rounded_up(
        torch.tensor([amax[n] for n in names], dtype=torch.float32) * margin / _E4M3_MAX
    )
    return dict(zip(names, scales, strict=True))


def _given(
    batches: Iterable[Mapping[str, torch.Tensor] | torch.Tensor],
) -> Iterator[Mapping[str, torch.Tensor]]:
    for batch in batches:
        yield {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """The next BF16 values, in float32; 1.0, vLLM's default, for caches that hold only zeros."""
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    near = scales.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)  # positive: the next larger value
    return torch.where(near.float() < scales, above.float(), near.float())
