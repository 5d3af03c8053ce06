"""Other implementations of blockwise weight quantization, each as x -> (codes, scale_inv).

Called as a user would call them. One that is not installed is left out; `missing` says why.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Pair = tuple[torch.Tensor, torch.Tensor]


def transformer_engine(x: torch.Tensor, pow2: bool) -> Pair:
    quantizer = _te_quantizer(pow2)
    made = quantizer(x)
    data, scale_inv = made._rowwise_data, made._rowwise_scale_inv
    return data, scale_inv[: -(-x.shape[0] // 128), : -(-x.shape[1] // 128)]


@functools.lru_cache
def _te_quantizer(pow2: bool) -> Callable[[torch.Tensor], object]:
    import transformer_engine.pytorch  # noqa: F401  (loads the libraries)
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    return Float8BlockQuantizer(
        tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=False,
        force_pow_2_scales=pow2,
        block_scaling_dim=2,
    )


def deep_gemm(x: torch.Tensor, pow2: bool) -> Pair:
    from vllm.third_party.deep_gemm.utils.math import per_block_cast_to_fp8

    return per_block_cast_to_fp8(x, use_ue8m0=pow2)


def vllm(x: torch.Tensor, pow2: bool) -> Pair:
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    return per_block_cast_to_fp8(x, use_ue8m0=pow2)


def torchao(x: torch.Tensor, pow2: bool) -> Pair:
    from torchao.prototype.blockwise_fp8_training.kernels import (
        triton_fp8_blockwise_weight_quant_rhs,
    )

    if pow2:
        raise NotImplementedError("torchao has no power-of-two scales here")
    return triton_fp8_blockwise_weight_quant_rhs(x)


PEERS = {
    "transformer-engine": transformer_engine,
    "deepgemm-torch": deep_gemm,
    "vllm-torch": vllm,
    "torchao": torchao,
}


def version(name: str) -> str:
    """Of the package that a peer comes from, once it was called."""
    package = {"transformer-engine": "transformer_engine", "torchao": "torchao"}.get(name, "vllm")
    return str(getattr(sys.modules[package], "__version__", "unknown"))


def available(x: torch.Tensor) -> tuple[dict[tuple[str, str], Callable[[], Pair]], dict[str, str]]:
    """({(peer, formula): call}, {peer: why it is missing}) for the peers that run here."""
    found: dict[tuple[str, str], Callable[[], Pair]] = {}
    missing: dict[str, str] = {}
    for name, peer in PEERS.items():
        for formula in ("pow2", "fp32"):
            call = functools.partial(peer, x, formula == "pow2")
            try:
                call()
            except NotImplementedError:
                continue
            except Exception as error:  # noqa: BLE001  (whatever keeps a peer from running)
                missing[name] = f"{type(error).__name__}: {str(error)[:120]}"
                continue
            found[name, formula] = call
    return found, missing
