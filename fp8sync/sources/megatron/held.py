"""How a parameter is held: plain elements, or E4M3 codes with one scale_inv per 128x128 block.

Told parameter by parameter, from the tensor itself: Transformer Engine leaves the first and last
layers, embeddings, norms and routers in BF16. A pair is read where it lies. Transformer Engine pads
the columns of its scales to a multiple of four; the padding is stepped over by the row stride, so
that there is no cropped copy that could be out of date.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.manifest import ITEMSIZE
from fp8sync.plan.boxes import block_shape
from fp8sync.recipe import BLOCK, Encoding, Formula

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Held", "expert_of", "held"]


@dataclass(frozen=True)
class Held:
    """A parameter's live tensors: elements or codes, and scale_inv where it has them."""

    weight: torch.Tensor
    scale_inv: torch.Tensor | None = None
    formula: Formula | None = None

    @property
    def dtype(self) -> str:
        """Torch name of the elements' dtype."""
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def encoding(self) -> Encoding:
        """Plain, or blockwise where there are scales."""
        return Encoding.PLAIN if self.scale_inv is None else Encoding.BLOCKWISE


def held(parameter: torch.Tensor) -> Held:
    """Look at a parameter; nothing is copied.

    Raises:
        ValueError: it is held in a way that cannot be sent as it is.
    """
    metadata = _quantized_metadata(parameter)
    if metadata is not None:
        return _blockwise(metadata, tuple(parameter.shape))
    tensor = parameter.detach()
    if tensor.is_meta:
        raise ValueError("expected data, found a meta tensor")
    plain = Held(tensor)
    if plain.dtype not in ITEMSIZE:
        raise ValueError(f"dtype {plain.dtype} cannot travel")
    return plain


def expert_of(parameter: torch.Tensor, number: int) -> torch.Tensor:
    """Return one of the experts that a parameter stacks; nothing is copied.

    Transformer Engine's `GroupedTensor` has its elements in a flat `rowwise_data`, which optimizers may
    replace, and forbids indexing.

    Raises:
        ValueError: the experts are quantized; Transformer Engine pads and swizzles the scales of such.
    """
    quantizer = getattr(parameter, "quantizer", None)
    if quantizer is not None:
        raise ValueError(
            f"experts in one parameter: expected plain elements, found {type(quantizer).__name__}'s"
        )
    elements = getattr(parameter, "rowwise_data", parameter)
    return elements.detach().view(parameter.shape)[number]


def _quantized_metadata(parameter: torch.Tensor) -> Mapping[str, Any] | None:
    read = getattr(parameter, "get_metadata", None)
    if not callable(read):
        return None
    metadata = read()
    if "is_2D_scaled" not in metadata:
        kind = type(parameter).__name__
        raise ValueError(f"expected blockwise FP8 (Float8BlockwiseQTensor), found {kind}")
    return metadata


def _blockwise(metadata: Mapping[str, Any], shape: tuple[int, ...]) -> Held:
    codes, scale_inv = metadata.get("rowwise_data"), metadata.get("rowwise_scale_inv")
    faults = list(_faults(metadata, codes, scale_inv, shape))
    if faults or codes is None or scale_inv is None:
        raise ValueError("; ".join(faults))
    formula = Formula.POW2 if metadata["quantizer"].force_pow_2_scales else Formula.FP32
    return Held(codes.detach().view(torch.float8_e4m3fn), scale_inv.detach(), formula)


def _faults(
    metadata: Mapping[str, Any],
    codes: torch.Tensor | None,
    scale_inv: torch.Tensor | None,
    shape: tuple[int, ...],
) -> Iterator[str]:
    quantizer = metadata.get("quantizer")
    dtype = metadata.get("fp8_dtype", "E4M3")
    dtype = str(getattr(dtype, "name", dtype))  # an IntEnum, whose text is a number
    grid = block_shape(shape)
    if codes is None:
        usage = "columnwise only" if metadata.get("columnwise_data") is not None else "no data"
        yield f"expected rowwise_data, found {usage}"
    elif tuple(codes.shape) != shape or len(shape) != 2 or codes.element_size() != 1:
        yield f"expected 1-byte codes {list(shape)}, found {codes.dtype} {list(codes.shape)}"
    if scale_inv is None:
        yield "expected rowwise_scale_inv, found none"
    elif scale_inv.dtype != torch.float32 or not _covers(scale_inv, grid):
        found = f"{scale_inv.dtype} {list(scale_inv.shape)}"
        yield f"expected scale_inv torch.float32 {list(grid)}, or its columns padded to fours, found {found}"
    if not metadata["is_2D_scaled"]:
        yield f"expected scales of {BLOCK}x{BLOCK} blocks, found scales of 1x{BLOCK} rows"
    if "E4M3" not in dtype.upper():
        yield f"expected E4M3 codes, found {dtype}"
    if getattr(quantizer, "block_len", None) != BLOCK:
        yield f"expected block_len {BLOCK}, found {getattr(quantizer, 'block_len', None)}"
    if not isinstance(getattr(quantizer, "force_pow_2_scales", None), bool):
        yield "expected a quantizer that says force_pow_2_scales, found none"


def _covers(scale_inv: torch.Tensor, grid: tuple[int, ...]) -> bool:
    """`get_scale_shape` of Transformer Engine's Float8BlockQuantizer (2.20.2) pads no rows."""
    rows, cols = grid if len(grid) == 2 else (0, 0)
    return tuple(scale_inv.shape) in ((rows, cols), (rows, -(-cols // 4) * 4))
