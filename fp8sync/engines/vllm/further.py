"""Layers that predict further tokens (MTP), which the engine's main model leaves to a speculative drafter."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["not_of_main_model"]

_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""What configs call the number of such layers that follow the model's own; read of vLLM 0.27.1's loaders."""
_WITHIN = r"(?:(?:model|language_model)\.)*"
_LAYER = re.compile(_WITHIN + r"layers\.(\d+)\.")
_APART = re.compile(_WITHIN + r"mtp[._]")


def not_of_main_model(name: str, config: Any) -> str:
    """Return why a tensor that the engine's loader skips is none of the main model's.

    Args:
        name: of the tensor, as in a checkpoint.
        config: the engine's own Hugging Face config, of the text model.

    Returns:
        The reason; empty for a tensor that nobody may leave out.
    """
    if _APART.match(name):
        return "the engine's loader skips it: MTP weights, of a speculative drafter"
    layer = _LAYER.match(name)
    own = getattr(config, "num_hidden_layers", None)
    if layer is None or own is None:
        return ""
    for key in _COUNTS:
        count = getattr(config, key, None) or 0
        if own <= int(layer[1]) < own + count:
            return (
                f"the engine's loader skips it: layer {layer[1]} is MTP, of a speculative drafter "
                f"(num_hidden_layers {own}, {key} {count})"
            )
    return ""
