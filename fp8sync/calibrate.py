"""Scales for an FP8 KV cache, from what a Hugging Face model puts into its own cache.

The keys of a forward pass's `past_key_values` are normalized and rotated, as vLLM stores them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fp8sync.errors import UnsupportedLayout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["calibrate_kv"]

_E4M3_MAX = 448.0


@torch.no_grad()
def calibrate_kv(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor] | torch.Tensor],
    *,
    percentile: float = 100.0,
    margin: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Return KV-cache scales for `fp8sync.refit(..., kv_scales=...)`.

    A scale is `percentile of amax * margin / 448`, where amax is taken over the heads and elements of one
    token, and the percentile over all tokens. It is rounded up to a BF16 value, which vLLM's first load
    and its reload keep alike. On a trainer of several ranks every rank calls this, with batches and heads
    of its own; all get the largest.

    Args:
        model: a Hugging Face causal language model.
        batches: each `input_ids` [batch, length], or the keyword arguments of a forward pass. Tokens
            that `attention_mask` hides are not counted.
        percentile: of the tokens' amax, 0 to 100; what lies above saturates.
        margin: for tokens larger than any seen here.

    Returns:
        By vLLM's parameter name, `<attention module>.attn.k_scale` and `.v_scale`: float32 scalars on
        the CPU.

    Raises:
        ValueError: no batches, or a percentile or margin that makes no sense.
        UnsupportedLayout: the model's cache holds no keys and values per head.

    Example:
        >>> scales = fp8sync.calibrate_kv(model, [input_ids])  # doctest: +SKIP
        >>> fp8sync.refit(model, llm, kv_scales=scales)  # doctest: +SKIP
    """
    if not 0 < percentile <= 100 or not 0 < margin < math.inf:
        raise ValueError(f"percentile {percentile} is not in (0, 100], or margin {margin} <= 0")
    if getattr(model.config, "kv_lora_rank", None):
        raise UnsupportedLayout("vLLM's MLA layers keep no KV-cache scales")
    places = {
        int(module.layer_idx): name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
    }
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    for batch in batches:
        given = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
        mask = given.get("attention_mask")
        cache = model(**given, use_cache=True).past_key_values
        for index, name in places.items():
            for kind, tensor in _cached(cache, index, name):
                largest = tensor.abs().amax((1, 3)).float()  # [batch, length]
                shown = largest if mask is None else largest[mask.bool()]
                seen[f"{name}.attn.{kind}_scale"].append(shown.flatten().cpu())
    if not seen:
        raise ValueError("no batches to calibrate with")
    names = sorted(seen)
    amax = torch.stack([torch.quantile(torch.cat(seen[n]), percentile / 100) for n in names])
    scales = _rounded_up(_largest_of_all_ranks(amax) * margin / _E4M3_MAX)
    return dict(zip(names, scales, strict=True))


def _cached(cache: Any, index: int, name: str) -> Iterable[tuple[str, torch.Tensor]]:
    layer = cache.layers[index]
    for kind, attribute in (("k", "keys"), ("v", "values")):
        tensor = getattr(layer, attribute, None)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            raise UnsupportedLayout(
                f"{name}: expected cached {attribute} [batch, heads, length, dim]"
            )
        yield kind, tensor


def _largest_of_all_ranks(amax: torch.Tensor) -> torch.Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return amax
    shared = amax.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.cpu()


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """The next BF16 values, in float32; 1.0, vLLM's default, for caches that hold only zeros."""
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    near = scales.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)  # positive: the next larger value
    return torch.where(near.float() < scales, above.float(), near.float())
