from __future__ import annotations

import pytest
import torch
from torch import library

from fp8sync_kernels import quantize_blockwise
from fp8sync_kernels.ops import quantize_matrix
from tests.kernels.cases import hard


def test_operator_is_traceable():
    library.opcheck(
        quantize_matrix,
        (hard(130, 140), "pow2"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_operator_is_exported_as_one_node():
    class Quantizer(torch.nn.Module):
        def forward(self, x):
            return quantize_matrix(x, "pow2")

    exported = torch.export.export(Quantizer(), (hard(130, 140),))
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.fp8sync_kernels.quantize_matrix.default) == 1
    x = hard(130, 140, seed=1)
    for ours, expected in zip(exported.module()(x), quantize_blockwise(x, "pow2"), strict=True):
        assert torch.equal(ours.float(), expected.float())


def test_operator_is_the_reference_on_cpu():
    x = hard(130, 140)
    for ours, expected in zip(
        quantize_matrix(x, "fp32"), quantize_blockwise(x, "fp32"), strict=True
    ):
        assert torch.equal(ours.float(), expected.float())


def test_operator_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="is not one of pow2, fp32"):
        quantize_matrix(torch.zeros(2, 2), "e8m0")
    with pytest.raises(TypeError, match="2-D tensor of bfloat16, float16, float32"):
        quantize_matrix(torch.zeros(2, 2).long(), "pow2")
