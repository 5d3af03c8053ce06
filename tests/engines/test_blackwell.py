"""Layouts of Blackwell's and FlashInfer's kernels, by vLLM's own functions as far as these run on a processor.

What they call of DeepGEMM, the packing of UE8M0 scales, is a CUDA kernel; `fp8sync_kernels.layouts.pack_ue8m0`, written
from DeepGEMM's description of the layout, is in its place. FlashInfer's TRT-LLM shuffles are not tried.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFp8BlockScaledMMKernel
from vllm.model_executor.kernels.linear.scaled_mm.deep_gemm import DeepGemmFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.oracle.fp8 import (
    Fp8MoeBackend,
    convert_to_fp8_moe_kernel_format,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.utils import fp8_utils
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading
from vllm.model_executor.utils import replace_parameter

from fp8sync.engines.vllm import compat
from fp8sync.engines.vllm.install import ProcessInstall, process_module
from fp8sync.engines.vllm.storage import EngineLayout, StorageSpec
from fp8sync.engines.vllm.strategy import _keeps_values, direct_modules
from fp8sync.manifest import Manifest
from fp8sync.recipe import Formula
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise
from fp8sync_kernels.layouts import pack_ue8m0

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
ROWS, COLS, EXPERTS = 256, 640, 3


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fp8_utils, "is_deep_gemm_e8m0_used", lambda: True)
    with torch.compiler.set_stance("force_eager"):
        yield


def sm_100(sf: torch.Tensor, mn: int, **_: Any) -> torch.Tensor:
    return pack_ue8m0(sf, mn)


def sm_90(sf: torch.Tensor, **_: Any) -> torch.Tensor:
    return sf


class Method(QuantizeMethodBase):
    """Processes weights by one of vLLM's functions."""

    def __init__(self, process: Callable[[Any], None]) -> None:
        self._process = process

    def create_weights(self, *_: Any, **__: Any) -> None: ...

    def apply(self, *_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._process(layer)


def linear(kernel: type[Any]) -> torch.nn.Module:
    """A linear layer of a kernel that was not asked whether it runs here."""
    made: Any = object.__new__(kernel)
    made.is_deep_gemm_supported = made.use_deep_gemm_e8m0 = True
    return layer({"weight": (ROWS, COLS)}, Method(made.process_weights_after_loading))


def experts(process: Callable[[Any], None]) -> torch.nn.Module:
    return layer(
        {"w13_weight": (EXPERTS, 2 * ROWS, COLS), "w2_weight": (EXPERTS, COLS, ROWS)},
        Method(process),
    )


def convert(backend: Fp8MoeBackend, module: Any, *, gated: bool = True) -> None:
    """What vLLM's method for FP8 experts does with their weights."""
    module.moe_config = SimpleNamespace(is_act_and_mul=gated)
    module.activation = SimpleNamespace(is_gated=gated)
    names = ("w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv")
    given = (getattr(module, name) for name in names)
    tensors = convert_to_fp8_moe_kernel_format(backend, module, *given, None, None)
    for name, tensor in zip(names, tensors, strict=True):
        replace_parameter(module, name, tensor.data)


deep_gemm_experts = partial(convert, Fp8MoeBackend.DEEPGEMM)
flashinfer_experts = partial(convert, Fp8MoeBackend.FLASHINFER_CUTLASS)


def layer(shapes: dict[str, tuple[int, ...]], method: Method) -> torch.nn.Module:
    """A module in load form, as vLLM has it before the first load."""
    module = torch.nn.Module()
    module.weight_block_size = [128, 128]
    module.quant_method = method
    for name, shape in shapes.items():
        grid = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
        for local, size, dtype in (
            (name, shape, torch.float8_e4m3fn),
            (f"{name}_scale_inv", grid, torch.float32),
        ):
            tensor = torch.zeros(size, dtype=dtype)
            module.register_parameter(local, torch.nn.Parameter(tensor, requires_grad=False))
    record_metadata_for_reloading(module)
    return module


def forms(module: torch.nn.Module) -> dict[str, StorageSpec]:
    found = {}
    for name, tensor in module.named_parameters():
        found[name] = StorageSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return found


def random_pairs(specs: dict[str, StorageSpec], formula: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    found = {}
    for name, spec in specs.items():
        if not name.endswith("_scale_inv"):
            flat = torch.randn(spec.size).reshape(-1, *spec.size[-2:])
            pairs = [quantize_blockwise(matrix, formula) for matrix in flat]
            found[name] = torch.stack([p.weight for p in pairs]).view(spec.size)
            scales = torch.stack([p.scale_inv for p in pairs])
            found[f"{name}_scale_inv"] = scales.view(specs[f"{name}_scale_inv"].size)
    return found


def load(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A first load."""
    for name, tensor in tensors.items():
        module.get_parameter(name).data.copy_(tensor)
    process_module(module)
    return module


def planes(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor) if tensor.ndim == 3 else [tensor]


def unpacked(words: torch.Tensor, cols: int) -> torch.Tensor:
    """Scales of packed exponents, one for each row of blocks."""
    exponents = torch.stack([(words[::128] >> shift) & 0xFF for shift in (0, 8, 16, 24)], -1)
    return torch.exp2(exponents.reshape(len(exponents), -1)[:, :cols].float() - 127)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


MAKERS = {
    "linear": lambda: linear(DeepGemmFp8BlockScaledMMKernel),
    "experts": lambda: experts(deep_gemm_experts),
    "flashinfer": lambda: experts(flashinfer_experts),
}


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_packed_scales_are_those_of_unchanged_weights(kind: str, monkeypatch: Any) -> None:
    """pow2 loses nothing on the way into DeepGEMM's layout; its re-encoding changes no value."""
    monkeypatch.setattr(fp8_utils, "transform_sf_into_required_layout", sm_100)
    module = MAKERS[kind]()
    given = random_pairs(forms(module), "pow2", 1)
    load(module, given)
    for name in [n for n in given if not n.endswith("_scale_inv")]:
        scale = f"{name}_scale_inv"
        packed = planes(module.get_parameter(scale))
        assert {words.dtype for words in packed} == {torch.int32}
        codes, old = planes(module.get_parameter(name)), planes(given[name])
        for code, words, before, grid in zip(codes, packed, old, planes(given[scale]), strict=True):
            now = unpacked(words, grid.shape[1])
            assert torch.equal(pack_ue8m0(now, len(code)), words)
            wanted = dequantize_blockwise(before, grid, torch.float32)
            assert torch.equal(dequantize_blockwise(code, now, torch.float32), wanted)


@pytest.mark.parametrize("kind", MAKERS)
def test_installed_by_process_as_by_a_first_load(kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(fp8_utils, "transform_sf_into_required_layout", sm_100)
    root, fresh = torch.nn.Module(), MAKERS[kind]()
    root.layer = MAKERS[kind]()
    specs = forms(fresh)
    layout = EngineLayout(Manifest({}), {f"layer.{name}": spec for name, spec in specs.items()})
    load(root.layer, random_pairs(specs, "pow2", 1))
    places = {name: tensor.data_ptr() for name, tensor in root.named_parameters()}
    new = random_pairs(specs, "pow2", 2)
    install = ProcessInstall(root, layout, CPU, DTYPE)
    install.prepare({f"layer.{n}": t.clone() for n, t in new.items()})
    install.commit()
    load(fresh, new)
    assert places == {name: tensor.data_ptr() for name, tensor in root.named_parameters()}
    for name, wanted in fresh.named_parameters():
        found = root.layer.get_parameter(name)
        assert found.stride() == wanted.stride()
        assert torch.equal(bits(found), bits(wanted))


@pytest.mark.parametrize(
    ("make", "transform", "formula", "direct"),
    [
        (lambda: linear(CutlassFp8BlockScaledMMKernel), sm_90, Formula.FP32, True),
        (lambda: linear(DeepGemmFp8BlockScaledMMKernel), sm_90, Formula.POW2, True),
        (lambda: linear(DeepGemmFp8BlockScaledMMKernel), sm_90, Formula.FP32, False),
        (lambda: linear(DeepGemmFp8BlockScaledMMKernel), sm_100, Formula.POW2, False),
        (lambda: experts(deep_gemm_experts), sm_90, Formula.POW2, True),
        (lambda: experts(deep_gemm_experts), sm_100, Formula.POW2, False),
        (lambda: experts(flashinfer_experts), sm_90, Formula.POW2, False),
        (lambda: experts(partial(flashinfer_experts, gated=False)), sm_90, Formula.POW2, True),
        (lambda: experts(partial(flashinfer_experts, gated=False)), sm_90, Formula.FP32, False),
    ],
)
def test_what_may_be_overwritten_and_what_is_processed(
    make: Callable[[], torch.nn.Module],
    transform: Callable[..., torch.Tensor],
    formula: Formula,
    direct: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fp8_utils, "transform_sf_into_required_layout", transform)
    module = make()
    specs = forms(module)
    formulas = {name: formula if name.endswith("_scale_inv") else None for name in specs}
    load(module, random_pairs(specs, formula.value, 3))
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    assert _keeps_values(module, specs, formulas, CPU, DTYPE) is direct
    for name, tensor in module.named_parameters():
        assert torch.equal(tensor.float(), before[name].float())


def test_a_proof_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory is no reason to process a module at every refit without a word."""
    monkeypatch.setattr(compat, "kernels_live_in_parameters", lambda _: True)
    root = torch.nn.Module()
    root.layer, root.other = (linear(CutlassFp8BlockScaledMMKernel) for _ in range(2))
    for module in (root.layer, root.other):
        load(module, random_pairs(forms(module), "fp32", 4))
    before = root.other.weight.clone()

    def full(_: Any) -> None:
        raise torch.OutOfMemoryError("no 9 bytes")

    root.other.quant_method = Method(full)
    specs = forms(root.layer)
    storages = {f"{at}.{n}": spec for at in ("layer", "other") for n, spec in specs.items()}
    found = direct_modules(root, EngineLayout(Manifest({}), storages), CPU, DTYPE)
    assert found == ({"layer"}, {"other": "OutOfMemoryError: no 9 bytes"})
    assert torch.equal(bits(root.other.weight), bits(before))
