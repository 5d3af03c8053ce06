"""Codes and scales by the rules of other implementations, beside ours, on the CPU.

    python -m scripts.bench.formulas

Each rule is written from its implementation's source, in IEEE arithmetic: what a GPU makes of `/` in
Triton or of a compiled graph differs once more. 1,024 Gaussian blocks of standard deviation 0.02, the
same for all; none is empty, tiny or ragged, where rules differ by definition (docs/numerics.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8sync_kernels import dequantize_blockwise, partial_amax, quantize_blockwise
from fp8sync_kernels.reference.blockwise import cast_e4m3, expand_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

Pair = tuple[torch.Tensor, torch.Tensor]
SIZE = 4096


def of(value: float, like: torch.Tensor) -> torch.Tensor:
    """A tensor, since PyTorch divides tensors and numbers in other ways."""
    return torch.full_like(like, value)


def made(x: torch.Tensor, multiplier: torch.Tensor, scale_inv: torch.Tensor) -> Pair:
    return cast_e4m3(x.float() * expand_blocks(multiplier, x.shape)), scale_inv


def quotient(x: torch.Tensor, amax: torch.Tensor) -> Pair:
    scale_inv = amax / of(448, amax)
    return made(x, of(1, amax) / scale_inv, scale_inv)


def product(x: torch.Tensor, amax: torch.Tensor) -> Pair:
    scale_inv = amax * (of(1, amax) / of(448, amax))
    return made(x, of(1, amax) / scale_inv, scale_inv)


def two_quotients(x: torch.Tensor, amax: torch.Tensor) -> Pair:
    return made(x, of(448, amax) / amax, amax / of(448, amax))


def reciprocal(x: torch.Tensor, amax: torch.Tensor) -> Pair:
    scale = amax.reciprocal() * 448
    return made(x, scale, of(1, amax) / scale)


def in_bf16(x: torch.Tensor, amax: torch.Tensor) -> Pair:
    scale_inv = amax.bfloat16() / of(448, amax).bfloat16()
    codes = cast_e4m3((x / expand_blocks(scale_inv, x.shape)).float())
    return codes, scale_inv.float()


def logarithm(x: torch.Tensor, amax: torch.Tensor) -> Pair:
    exponent = torch.ceil(torch.log2(amax / of(448, amax)))
    return made(x, torch.exp2(-exponent), torch.exp2(exponent))


RULES: list[tuple[str, str, Callable[[torch.Tensor, torch.Tensor], Pair]]] = [
    ("fp32", "amax/448, x*(1/scale_inv): slime, miles, verl (Triton), DeepGEMM on a CPU", quotient),
    ("fp32", "amax*fl(1/448), x*(1/scale_inv): DeepGEMM on a GPU", product),
    ("fp32", "amax/448, x*(448/amax): TileKernels", two_quotients),
    ("fp32", "1/(fl(1/amax)*448), x*(fl(1/amax)*448): NeMo-RL, verl (PyTorch)", reciprocal),
    ("fp32", "amax/448 and x/scale_inv in bf16: compressed-tensors", in_bf16),
    ("pow2", "2^ceil(log2(amax/448)): NeMo-RL, vLLM", logarithm),
]


def compare(name: str, ours: Pair, other: Pair) -> None:
    codes, others = (pair[0].view(torch.uint8).int() for pair in (ours, other))
    differ = int((codes != others).sum())
    scales = int((ours[1] != other[1]).sum())
    worst = int((codes - others).abs().max())
    print(
        f"{name}: {differ} codes ({differ / codes.numel():.3%}), {scales} of {other[1].numel()} "
        f"scales, largest difference of codes {worst}"
    )


def rms(pair: Pair, values: torch.Tensor) -> float:
    return (
        dequantize_blockwise(*pair, torch.float32).double() - values
    ).square().mean().item() ** 0.5


def main() -> None:
    torch.manual_seed(0)
    master = torch.randn(SIZE, SIZE) * 0.02
    x = master.bfloat16()
    amax = partial_amax(x)
    ours = {formula: quantize_blockwise(x, formula)[:2] for formula in ("pow2", "fp32")}
    print(f"torch {torch.__version__}: {x.numel()} codes, {amax.numel()} scales")
    for formula, name, rule in RULES:
        compare(f"{formula}, {name}", ours[formula], rule(x, amax))
    for formula, pair in ours.items():
        compare(f"{formula}, of the fp32 master", pair, quantize_blockwise(master, formula)[:2])
    twice = quantize_blockwise(dequantize_blockwise(*ours["fp32"], torch.float32), "pow2")[:2]
    more = rms(twice, x.double()) / rms(ours["pow2"], x.double()) - 1
    print(f"fp32, then pow2: {more:.1%} more RMS error than pow2 at once")


if __name__ == "__main__":
    main()
