"""Scale layouts and byte views."""

from __future__ import annotations

import pytest
import torch

from fp8sync_kernels.byte_views import as_bytes, as_fp8, flat_bytes, typed_part
from fp8sync_kernels.layouts import (
    add_te_padding,
    from_ue8m0,
    pack_ue8m0,
    strip_te_padding,
    to_ue8m0,
)


def powers(rows, cols):
    exponents = torch.randint(-20, 20, (rows, cols), generator=torch.Generator().manual_seed(3))
    return torch.exp2(exponents.float())


@pytest.mark.parametrize("cols", [1, 4, 5, 8])
def test_te_padding_both_ways(cols):
    scale_inv = powers(3, cols)
    padded = add_te_padding(scale_inv)
    assert padded.shape == (3, -(-cols // 4) * 4)
    assert (padded[:, cols:] == 1).all()
    shape = (300, cols * 128 - 5)
    assert torch.equal(strip_te_padding(padded, shape), scale_inv)
    assert torch.equal(strip_te_padding(scale_inv, shape), scale_inv)
    with pytest.raises(ValueError, match="has shape"):
        strip_te_padding(padded, (300, cols * 128 + 1000))


def test_ue8m0_is_the_exponent_byte():
    assert to_ue8m0(torch.tensor([1.0, 2.0, 0.5, 2.0**-22])).tolist() == [127, 128, 126, 105]
    scale_inv = powers(3, 5)
    assert torch.equal(from_ue8m0(to_ue8m0(scale_inv)), scale_inv)
    for wrong in (3.0, 0.0, -2.0, float("inf"), 2.0**-130):
        with pytest.raises(ValueError, match="no powers of two"):
            to_ue8m0(torch.tensor([[1.0, wrong]]))


@pytest.mark.parametrize(("rows", "cols"), [(130, 5), (256, 8), (126, 1)])
def test_packed_ue8m0(rows, cols):
    """By the documented format, byte by byte, through the strides that TMA would use."""
    scale_inv = powers(-(-rows // 128), cols)
    packed = pack_ue8m0(scale_inv, rows)
    aligned = -(-rows // 4) * 4
    words = -(-cols // 4)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words)
    assert packed.stride() == (1, aligned)
    assert packed.untyped_storage().nbytes() == aligned * words * 4
    memory = torch.empty(0, dtype=torch.uint8).set_(packed.untyped_storage())
    exponents = to_ue8m0(scale_inv)
    for row in range(rows):
        for col in range(words * 4):
            byte = memory[((col // 4) * aligned + row) * 4 + col % 4]
            assert byte == (exponents[row // 128, col] if col < cols else 0)


def test_packed_ue8m0_of_a_stack_of_experts():
    """Each as if alone, one behind the other."""
    scale_inv = powers(6, 5).view(3, 2, 5)
    packed = pack_ue8m0(scale_inv, 130)
    assert packed.stride() == (2 * 132, 1, 132)
    for grid, words in zip(scale_inv, packed, strict=True):
        assert torch.equal(words, pack_ue8m0(grid, 130))
    with pytest.raises(ValueError, match="2 rows of scales for 300 rows"):
        pack_ue8m0(scale_inv, 300)


def test_byte_views_alias():
    weight = torch.randn(6, 8).to(torch.float8_e4m3fn)[:, 2:6]
    view = as_bytes(weight)
    assert view.data_ptr() == weight.data_ptr()
    assert view.stride() == weight.stride()
    view[1, 1] = 0x38
    assert weight[1, 1].float() == 1.0
    back = as_fp8(view)
    assert back.data_ptr() == weight.data_ptr()
    assert back.dtype == torch.float8_e4m3fn
    with pytest.raises(TypeError):
        as_bytes(torch.zeros(2))
    with pytest.raises(TypeError):
        as_fp8(view, torch.float16)


def test_flat_bytes_and_typed_part():
    buffer = torch.zeros(64, dtype=torch.uint8)
    part = typed_part(buffer, 16, (2, 3), torch.float32)
    part.fill_(1.0)
    assert torch.equal(buffer[16:40], flat_bytes(torch.ones(2, 3)))
    assert buffer[40:].sum() == 0
    with pytest.raises(ValueError, match="cannot start at byte 18"):
        typed_part(buffer, 18, (1,), torch.float32)
    with pytest.raises(ValueError, match="of a buffer of 64"):
        typed_part(buffer, 48, (5,), torch.float32)
    with pytest.raises(ValueError, match="not contiguous"):
        flat_bytes(torch.zeros(4, 4).T)
