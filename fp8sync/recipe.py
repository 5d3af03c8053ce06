"""Formats and formulas by name. Knows nothing of tensors, ranks or engines."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["BLOCK", "Encoding", "Formula", "Recipe"]

BLOCK = 128
"""Rows and columns of a weight block that shares one scale."""


class Formula(str, Enum):
    """How a block's scale follows from its largest magnitude (docs/numerics.md)."""

    POW2 = "pow2"
    FP32 = "fp32"


class Encoding(str, Enum):
    """How a tensor travels: as plain elements, or as E4M3 codes with one scale_inv per block."""

    PLAIN = "plain"
    BLOCKWISE = "blockwise"


_FORMULAS: dict[str, Formula | None] = {
    "blockwise": None,
    "blockwise-pow2": Formula.POW2,
    "blockwise-fp32": Formula.FP32,
    "bf16": None,
}
_UNQUANTIZED = (
    *("lm_head", "*.gate", "*.router", "*.shared_expert_gate"),
    # Of layers that predict further tokens; DeepSeek's FP8 checkpoints and vLLM keep them so.
    *("*.eh_proj", "*.shared_head.head"),
    # Two rows per head, merged: not whole blocks, which vLLM refuses.
    *("*.linear_attn.in_proj_ba", "*.linear_attn.in_proj_a", "*.linear_attn.in_proj_b"),
)
"""Modules that stay unquantized where no engine says so."""


@dataclass(frozen=True)
class Recipe:
    """What an engine is to hold after a refit.

    Args:
        name: `blockwise` (per tensor, the formula that the engine's kernel keeps unchanged),
            `blockwise-pow2`, `blockwise-fp32`, or `bf16` (nothing quantized).
        dequantize: for engines that hold no FP8 (a processor without AMX): weights still travel as
            codes and scales, and the engine stores `codes * scale_inv` rounded once to its own dtype.
        unquantized: patterns of module names that stay unquantized under `dequantize`, where the
            engine has no opinion of its own. An FP8 engine is asked instead.
        scales: `paired` puts each scale_inv where the engine keeps it, as its weight; `misc` gives all
            of them, as whole tensors, to the engine's own loader. The bytes are the same.
        on_format_mismatch: what becomes of an FP8 pair of the trainer that the engine cannot take as
            it is: `error` refuses it by name; `requantize` quantizes its values anew, or dequantizes
            them for an engine that keeps them unquantized. The report has the error that this makes.

    Raises:
        ValueError: unknown `name`, `scales` or `on_format_mismatch`, `dequantize` with `bf16`, or `misc` where
            the engine holds no scales.

    Examples:
        >>> Recipe("blockwise-pow2", scales="misc").quantizes
        True
    """

    name: str = "blockwise"
    dequantize: bool = False
    unquantized: tuple[str, ...] = _UNQUANTIZED
    scales: str = "paired"
    on_format_mismatch: str = "error"

    def __post_init__(self) -> None:
        if self.name not in _FORMULAS:
            raise ValueError(f"unknown recipe {self.name!r}; known: {', '.join(_FORMULAS)}")
        if self.dequantize and not self.quantizes:
            raise ValueError("dequantize has no meaning with recipe 'bf16'")
        if self.scales not in {"paired", "misc"}:
            raise ValueError(f"unknown scales {self.scales!r}; known: paired, misc")
        if self.on_format_mismatch not in {"error", "requantize"}:
            raise ValueError(
                f"unknown on_format_mismatch {self.on_format_mismatch!r}; known: error, requantize"
            )
        if self.scales == "misc" and (self.dequantize or not self.quantizes):
            raise ValueError("scales='misc' is for engines that hold FP8 weights")
        object.__setattr__(self, "unquantized", tuple(self.unquantized))

    @classmethod
    def of(cls, recipe: str | Recipe, scales: str | None = None) -> Recipe:
        """Return `recipe` itself, or the recipe of that name; with `scales`, if given.

        Raises:
            ValueError: as for `Recipe`.
        """
        found = recipe if isinstance(recipe, Recipe) else cls(recipe)
        return found if scales is None else replace(found, scales=scales)

    @property
    def requantizes(self) -> bool:
        """Whether pairs that do not fit may be quantized anew."""
        return self.on_format_mismatch == "requantize"

    @property
    def quantizes(self) -> bool:
        """Whether any weight becomes FP8."""
        return self.name != "bf16"

    def formula(self, kept: Formula) -> Formula:
        """Return the formula for a tensor whose kernel keeps `kept` unchanged."""
        return _FORMULAS[self.name] or kept

    def leaves_unquantized(self, tensor: str) -> bool:
        """Whether `tensor` (an HF parameter name) is excluded by `unquantized`."""
        module = tensor.rsplit(".", 1)[0]
        return any(fnmatchcase(module, pattern) for pattern in self.unquantized)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON-able data."""
        return {**asdict(self), "unquantized": list(self.unquantized)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recipe:
        """Rebuild a recipe from `to_json`."""
        return cls(**{**data, "unquantized": tuple(data["unquantized"])})
