"""What lands in the engine equals the whole HF tensor, quantized and then sliced, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import build_plan, fill_buckets
from fp8sync.plan.bucket import DEFAULT_BUCKET_BYTES
from fp8sync.recipe import Encoding, Formula
from fp8sync.wire.payload import pack, unpack, view
from fp8sync.wire.tables import PlacedBucket, pack_table, write_table
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise, run_table
from tests.layouts.misc_ranks import memory
from tests.unit import layouts
from tests.unit.layouts import Side, bits

if TYPE_CHECKING:
    from fp8sync.plan import Plan
    from fp8sync.wire.payload import PartReport

GUARD = 0xA5
CPU = torch.device("cpu")


def move(
    plan: Plan,
    source: dict[str, torch.Tensor],
    staging: dict[str, torch.Tensor],
    limit: int,
) -> list[PartReport]:
    """Send all of a plan through buckets, from every source rank to every destination rank."""
    reports = []
    for rank in sorted({copy.destination_rank for copy in plan.copies}):
        for bucket in fill_buckets(plan.to_rank(rank), limit):
            payload = torch.zeros(bucket.nbytes, dtype=torch.uint8)
            reports += pack(bucket, source, payload)
            unpack(bucket, payload, staging)
    return reports


def staging_of(side: Side, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The engine's storages, every byte of them a guard value."""
    storages = {}
    for name, size in side.sizes.items():
        kind = torch.float32 if name.endswith(".scale_inv") else dtype
        raw = torch.full((size * kind.itemsize,), GUARD, dtype=torch.uint8)
        storages[name] = raw.view(kind)
    return storages


@settings(max_examples=20)
@given(data=st.data())
def test_blockwise_equals_quantize_then_slice(data: st.DataObject) -> None:
    infos = data.draw(layouts.blockwise_infos())
    source = data.draw(layouts.sides(infos, unit=128, replicas=data.draw(st.integers(1, 2))))
    destination = data.draw(layouts.sides(infos, unit=128, scales=True))
    tensors = layouts.random_tensors(infos, data.draw(st.integers(0, 99)))
    plan = build_plan(source.manifest(layouts.as_source(infos)), destination.manifest(infos))
    found = staging_of(destination, torch.float8_e4m3fn)
    limit = data.draw(st.sampled_from([1, 20_000, 70_000, 1 << 26]))
    move(plan, layouts.held_by(source, tensors), found, limit)

    expected = staging_of(destination, torch.float8_e4m3fn)
    whole = {i.name: quantize_blockwise(tensors[i.name], i.formula.value) for i in infos}
    for box in layouts.boxes(destination):
        weight, scale_inv, _ = whole[box.tensor]
        first = tuple(a // 128 for a in box.start)
        blocks = tuple(-(-n // 128) for n in box.shape)
        _put(expected, box.at, layouts.cut(weight, box.start, box.shape))
        _put(expected, box.scale_at, layouts.cut(scale_inv, first, blocks))
    for name, storage in expected.items():
        assert torch.equal(bits(found[name]), bits(storage)), name


def _put(storages: dict[str, torch.Tensor], at: Placement, value: torch.Tensor) -> None:
    layouts.tensor_window(storages[at.storage], at, value.shape).copy_(value)


@settings(max_examples=20)
@given(data=st.data())
def test_an_engine_without_fp8_gets_codes_times_scales_rounded_once(data: st.DataObject) -> None:
    infos = data.draw(layouts.blockwise_infos(limit=1))
    source = data.draw(layouts.sides(infos, unit=128))
    destination = data.draw(layouts.sides(infos, unit=128))
    tensors = layouts.random_tensors(infos, 5)
    plan = build_plan(source.manifest(layouts.as_source(infos)), destination.manifest(infos))
    found = staging_of(destination, torch.bfloat16)
    move(plan, layouts.held_by(source, tensors), found, 40_000)
    (info,) = infos
    weight, scale_inv, _ = quantize_blockwise(tensors[info.name], info.formula.value)
    whole = dequantize_blockwise(weight, scale_inv, torch.bfloat16)
    for box in layouts.boxes(destination):
        window = layouts.tensor_window(found[box.at.storage], box.at, box.shape)
        assert torch.equal(bits(window), bits(layouts.cut(whole, box.start, box.shape)))


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        ("bfloat16", "bfloat16"),
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("int64", "int64"),
        ("bool", "bool"),
    ],
)
@settings(max_examples=15)
@given(data=st.data())
def test_plain_tensors_arrive_in_the_engines_dtype(
    held: str, wanted: str, data: st.DataObject
) -> None:
    infos = data.draw(layouts.plain_infos(wanted))
    source, destination = data.draw(layouts.sides(infos)), data.draw(layouts.sides(infos))
    kinds = getattr(torch, held), getattr(torch, wanted)
    generator = torch.Generator().manual_seed(7)
    tensors = {
        i.name: (torch.randn(i.shape, generator=generator) * 1000).to(kinds[0]) for i in infos
    }
    plan = build_plan(source.manifest(layouts.as_source(infos, held)), destination.manifest(infos))
    storages = {n: torch.zeros(s, dtype=kinds[0]) for n, s in source.sizes.items()}
    for box in layouts.boxes(source):
        _put(storages, box.at, layouts.cut(tensors[box.tensor], box.start, box.shape))
    found = {n: torch.zeros(s, dtype=kinds[1]) for n, s in destination.sizes.items()}
    move(plan, storages, found, 48)
    for box in layouts.boxes(destination):
        window = layouts.tensor_window(found[box.at.storage], box.at, box.shape)
        whole = tensors[box.tensor].to(kinds[1])
        assert torch.equal(bits(window), bits(layouts.cut(whole, box.start, box.shape)))


def _one(
    tensor: torch.Tensor, formula: Formula | None, *, scaled: bool = True
) -> tuple[Plan, dict[str, torch.Tensor]]:
    """A plan for one whole tensor from rank 0 to rank 0, and its source storages."""
    shape = tuple(tensor.shape)
    held = TensorInfo("w", shape, str(tensor.dtype).removeprefix("torch."))
    wanted = held
    scale_at = None
    if formula is not None:
        wanted = TensorInfo("w", shape, "float8_e4m3fn", Encoding.BLOCKWISE, formula)
        if scaled:
            scale_at = Placement("w_scale_inv", 0, (-(-shape[1] // 128), 1))
    start = (0,) * len(shape)
    source = Box("w", start, shape, Placement("w", 0, tensor.stride()))
    at = Placement("w", 0, torch.empty(shape, device="meta").stride())
    destination = Box("w", start, shape, at, scale_at)
    plan = build_plan(Manifest.of([held], {0: [source]}), Manifest.of([wanted], {0: [destination]}))
    return plan, {"w": tensor}


def test_a_storage_may_begin_inside_its_memory() -> None:
    """Placements count from a storage's first element, wherever that lies in an allocation."""
    memory = torch.arange(400.0).to(torch.bfloat16)
    tensor = memory[37:357].view(16, 20)[:, 3:11]
    plan, storages = _one(tensor, None)
    found = {"w": torch.zeros(16, 8, dtype=torch.bfloat16)}
    move(plan, storages, found, 1 << 20)
    assert torch.equal(found["w"], tensor)


def test_a_storage_may_be_a_parameter() -> None:
    """What is made of it has no history, whoever makes it."""
    weight = torch.nn.Parameter(torch.ones(16, 8))
    shown = view({"w": weight}, Placement("w", 8, (8, 1)), (15, 8))
    assert not shown.requires_grad
    assert shown.data_ptr() == weight[1:].data_ptr()


@pytest.mark.parametrize(("formula", "code"), [(Formula.POW2, 0x78), (Formula.FP32, 0x7E)])
def test_padding_between_parts_stays_zero(formula: Formula, code: int) -> None:
    """1.0 is 256 * 2^-8 by pow2, and 448 (E4M3's largest) times 1/448 by fp32."""
    plan, storages = _one(torch.ones(3, 5, dtype=torch.bfloat16), formula)
    (bucket,) = fill_buckets(plan.copies)
    payload = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    pack(bucket, storages, payload)
    assert bucket.nbytes == 32
    assert payload[:15].tolist() == [code] * 15
    assert payload[15] == 0
    assert payload[20:].count_nonzero() == 0


@pytest.mark.parametrize("formula", [None, *Formula])
@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_every_nonfinite_element_is_counted(formula: Formula | None, limit: int) -> None:
    x = torch.randn(300, 140, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    x[0, 0], x[131, 7], x[299, 139] = torch.nan, torch.inf, -torch.inf
    plan, storages = _one(x, formula)
    found = {
        "w": torch.zeros(
            300, 140, dtype=torch.bfloat16 if formula is None else torch.float8_e4m3fn
        ),
        "w_scale_inv": torch.zeros(3, 2),
    }
    reports = move(plan, storages, found, limit)
    assert sum(report.nonfinite for report in reports) == 3
    assert {report.tensor for report in reports} == {"w"}


def test_pairs_that_pass_through_are_counted() -> None:
    """Codes and scales, by buckets and by tables, whatever lies in the padding beside the scales."""
    scales = torch.ones(3, 4)
    scales[0, 1], scales[2, 0], scales[:, 2:] = torch.nan, torch.inf, torch.nan
    codes = torch.zeros(300, 140, dtype=torch.uint8)
    codes[0, 0], codes[131, 7], codes[299, 139] = 0x7F, 0xFF, 0x7E
    held = {"c": codes.view(torch.float8_e4m3fn), "s": scales}
    pair = "w", (300, 140), "float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2
    whole = "w", (0, 0), (300, 140)
    source = Box(*whole, Placement("c", 0, (140, 1)), Placement("s", 0, (4, 1)))
    wanted = Box(*whole, Placement("w", 0, (140, 1)), Placement("w_scale_inv", 0, (2, 1)))
    infos = [TensorInfo(*pair)]
    plan = build_plan(Manifest.of(infos, {0: [source]}), Manifest.of(infos, {0: [wanted]}))
    found = {"w": torch.zeros_like(held["c"]), "w_scale_inv": torch.zeros(3, 2)}
    (report,) = move(plan, held, found, 1 << 20)
    assert report.nonfinite == 4

    def where(name: str) -> tuple[int, str]:
        return held[name].data_ptr(), str(held[name].dtype).removeprefix("torch.")

    written = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
    (bucket,) = fill_buckets(plan.copies)
    payload = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    placed = PlacedBucket(bucket, payload.data_ptr(), slice(0, 1))
    for table in (
        write_table(plan.copies, where, lambda _, name: written[name].data_ptr(), CPU),
        pack_table([placed], where, torch.zeros(16, dtype=torch.uint8), {}),
    ):
        nonfinite = torch.zeros(table.slots, dtype=torch.int64)
        run_table(table, None, nonfinite)
        assert nonfinite.tolist() == [4]
    received = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
    unpack(bucket, payload, received)
    for name, tensor in found.items():
        assert torch.equal(bits(tensor), bits(written[name]))
        assert torch.equal(bits(tensor), bits(received[name]))


def test_a_value_that_overflows_the_engines_dtype_is_counted() -> None:
    x = torch.tensor([1.0, 7e4, -7e4])
    held, wanted = (TensorInfo("b", (3,), dtype) for dtype in ("float32", "float16"))
    box = Box("b", (0,), (3,), Placement("b", 0, (1,)))
    plan = build_plan(Manifest.of([held], {0: [box]}), Manifest.of([wanted], {0: [box]}))
    (report,) = move(plan, {"b": x}, {"b": torch.zeros(3, dtype=torch.float16)}, 1 << 20)
    assert report.nonfinite == 2


@pytest.mark.parametrize("formula", Formula)
def test_the_reported_error_is_the_frobenius_error(formula: Formula) -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    plan, storages = _one(x, formula)
    found = {
        "w": torch.zeros(256, 256, dtype=torch.float8_e4m3fn),
        "w_scale_inv": torch.zeros(2, 2),
    }
    (report,) = move(plan, storages, found, 1 << 20)
    value = dequantize_blockwise(found["w"], found["w_scale_inv"], torch.float32)
    assert report.error_sq == (value - x.float()).square().sum().item()
    assert report.norm_sq == x.float().square().sum().item()
    assert 0.0 < report.error_sq < report.norm_sq


@pytest.mark.parametrize("scales", [True, False])
def test_a_large_copy_takes_less_than_a_bucket_beside_its_message(scales: bool) -> None:
    """To quantize it whole would take half a GiB, and to dequantize it 0.4; either by one side."""
    shape = rows, cols = 8192, 4096
    at = Placement("w", 0, (cols, 1))
    held = Manifest.of([TensorInfo("w", shape, "bfloat16")], {0: [Box("w", (0, 0), shape, at)]})
    dtype = "float8_e4m3fn" if scales else "bfloat16"
    info = TensorInfo("w", shape, dtype, Encoding.BLOCKWISE, Formula.POW2)
    grid = Placement("s", 0, (cols // 128, 1)) if scales else None
    wanted = Manifest.of([info], {0: [Box("w", (0, 0), shape, at, grid)]})
    (bucket,) = fill_buckets(build_plan(held, wanted).to_rank(0), DEFAULT_BUCKET_BYTES)
    source = {"w": torch.ones(shape, dtype=torch.bfloat16)}
    staging = {
        "w": torch.zeros(rows * cols, dtype=getattr(torch, dtype)),
        "s": torch.zeros(rows * cols // 128**2),
    }
    payload = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    for step in (lambda: pack(bucket, source, payload), lambda: unpack(bucket, payload, staging)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmHWM")
        step()
        assert memory("VmHWM") - before < DEFAULT_BUCKET_BYTES
