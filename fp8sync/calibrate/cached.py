"""What a Hugging Face model puts into its own cache.

The keys of a forward pass's `past_key_values` are normalized and rotated, as vLLM stores them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.calibrate.evaluating import evaluating
from fp8sync.errors import UnsupportedLayout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["largest_cached"]


def largest_cached(
    model: Any, batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return every token's amax, by the name of the scale.

    Raises:
        UnsupportedLayout: the model's cache holds no keys and values per head, or not of all tokens.
    """
    if getattr(model.config, "kv_lora_rank", None):
        raise UnsupportedLayout("vLLM's MLA layers keep no KV-cache scales")
    places = {
        int(module.layer_idx): name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
    }
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    for given in batches:
        mask = given.get("attention_mask")
        with evaluating([model]):
            cache = model(**{**_whole(model), **given}, use_cache=True).past_key_values
        length = given["input_ids"].shape[1] if "input_ids" in given else None
        for index, name in places.items():
            for kind, tensor in _cached(cache, index, name):
                if length not in {None, tensor.shape[2]}:
                    raise UnsupportedLayout(
                        f"{name}: expected the cache of all {length} tokens, found {tensor.shape[2]}"
                    )
                largest = tensor.abs().amax((1, 3)).float()  # [batch, length]
                shown = largest if mask is None else largest[mask.bool()]
                seen[f"{name}.attn.{kind}_scale"].append(shown.flatten().cpu())
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _whole(model: Any) -> dict[str, Any]:
    """Return a cache that keeps every token: a window's own would forget all but the last ones."""
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if not any(kind in layers for kind in ("sliding_attention", "chunked_attention")):
        return {}
    from transformers import DynamicCache

    return {"past_key_values": DynamicCache()}


def _cached(cache: Any, index: int, name: str) -> Iterable[tuple[str, torch.Tensor]]:
    layer = cache.layers[index]
    for kind, attribute in (("k", "keys"), ("v", "values")):
        tensor = getattr(layer, attribute, None)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            raise UnsupportedLayout(
                f"{name}: expected cached {attribute} [batch, heads, length, dim]"
            )
        yield kind, tensor
