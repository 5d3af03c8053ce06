"""The tiny world behind the golden files: two trainer ranks, one engine rank, six tensors."""

from __future__ import annotations

import json
from typing import Any

import torch

from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import Plan, build_plan, fill_buckets
from fp8sync.plan.forward import (
    as_runs,
    forwarding_digest,
    forwarding_rows,
    handed_on,
    shared,
    with_forwarding,
)
from fp8sync.recipe import Encoding, Formula
from fp8sync.wire.header import ABORT, Header
from fp8sync.wire.payload import pack
from fp8sync_kernels import Matrix, Part, build_table, digest, job
from fp8sync_kernels.descriptor import Column, Dtype, Op
from fp8sync_kernels.descriptor import Path as InnerLoop

POW2 = ("float8_e4m3fn", Encoding.BLOCKWISE, Formula.POW2)
FP32 = ("float8_e4m3fn", Encoding.BLOCKWISE, Formula.FP32)
ENGINE_RANK = 1
BUCKET_BYTES = 400


def source_manifest() -> Manifest:
    """`tall` lies on both ranks in halves, `wide` is a transposed view, the rest is contiguous."""
    tensors = [
        TensorInfo("tall.weight", (131, 2), "bfloat16"),
        TensorInfo("wide.weight", (2, 3), "float32"),
        TensorInfo("norm.weight", (5,), "bfloat16"),
        TensorInfo("step", (), "int64"),
        TensorInfo("decay", (4,), "float32"),
        TensorInfo("mtp.norm.weight", (3,), "float32"),
    ]
    ranks = {
        0: [
            Box("tall.weight", (0, 0), (128, 2), Placement("flat", 6, (3, 1))),
            Box("norm.weight", (0,), (5,), Placement("norm", 0, (1,))),
            Box("step", (), (), Placement("step", 0, ())),
        ],
        1: [
            Box("tall.weight", (128, 0), (3, 2), Placement("tail", 0, (2, 1))),
            Box("wide.weight", (0, 0), (2, 3), Placement("turned", 1, (1, 2))),
            Box("decay", (0,), (4,), Placement("decay", 0, (1,))),
            Box("mtp.norm.weight", (0,), (3,), Placement("mtp", 0, (1,))),
            Box("norm.weight", (0,), (5,), Placement("norm", 0, (1,))),
        ],
    }
    return Manifest.of(tensors, ranks)


def engine_manifest() -> Manifest:
    """One engine rank; `tall` inside a fused storage with scales, `decay` by the misc path, one is left out."""
    reason = "the loader computes what it stores"
    tensors = [
        TensorInfo("tall.weight", (131, 2), *POW2),
        TensorInfo("wide.weight", (2, 3), *FP32),
        TensorInfo("norm.weight", (5,), "float32"),
        TensorInfo("step", (), "int64"),
        TensorInfo("decay", (4,), "float32", misc=reason),
        TensorInfo("mtp.norm.weight", (3,), "float32", unused="of a speculative drafter"),
    ]
    fused = Placement("layer.fused.weight", 512, (2, 1))
    scales = Placement("layer.fused.weight_scale_inv", 2, (1, 1))
    boxes = [
        Box("tall.weight", (0, 0), (131, 2), fused, scales),
        Box(
            "wide.weight",
            (0, 0),
            (2, 3),
            Placement("layer.wide.weight", 0, (3, 1)),
            Placement("layer.wide.weight_scale_inv", 0, (1, 1)),
        ),
        Box("norm.weight", (0,), (5,), Placement("layer.norm.weight", 0, (1,))),
        Box("step", (), (), Placement("layer.step", 0, ())),
        Box("decay", (0,), (4,), Placement("misc/decay", 0, (1,))),
    ]
    return Manifest.of(tensors, {ENGINE_RANK: boxes})


def storages(rank: int) -> dict[str, torch.Tensor]:
    """The trainer's memory, filled from arithmetic alone."""
    steps = torch.arange(400, dtype=torch.float32)
    values = (steps * 37 % 101 - 50) / 8  # exact in BF16
    norm = values[300:305].to(torch.bfloat16)
    if rank == 0:
        flat = values[:392].to(torch.bfloat16)
        return {"flat": flat, "norm": norm, "step": torch.tensor(2**40 + 7)}
    tail = values[10:16].to(torch.bfloat16)
    turned = torch.tensor([9.0, 1.0, -0.0, 0.3, 1e-5, -7.3, 2.5])
    mtp = torch.zeros(3)
    return {"tail": tail, "turned": turned, "decay": values[:4] / 3, "norm": norm, "mtp": mtp}


def plan() -> Plan:
    return build_plan(source_manifest(), engine_manifest())


# --- the golden files' contents -------------------------------------------------------------------


def manifest_json() -> str:
    source, engine = source_manifest(), engine_manifest()
    sides = {"source": source, "engine": engine}
    data = {n: {"digest": m.digest(), "manifest": m.to_json()} for n, m in sides.items()}
    return pretty(data)


def plan_json() -> str:
    made = plan()
    data = {
        "copies": [copy.to_json() for copy in made.copies],
        "digests": made.digests(ENGINE_RANK),
        "digest": made.digest(ENGINE_RANK),
    }
    return pretty(data)


def forward_json() -> str:
    """Two engine ranks of one node that want the same: the plan of each, and what goes between them."""
    engine = engine_manifest()
    boxes = engine.ranks[ENGINE_RANK]
    both = Manifest.of(engine.tensors.values(), {ENGINE_RANK: boxes, ENGINE_RANK + 1: boxes})
    direct = build_plan(source_manifest(), both)
    sharers = shared(direct, dict.fromkeys(both.ranks, "node"))
    made = with_forwarding(direct, sharers)
    data = {
        "shared": {rank: as_runs(ranks) for rank, ranks in sharers.items()},
        "copies": [copy.to_json() for copy in made.copies],
        "digests": {rank: made.digest(rank) for rank in both.ranks},
    }
    for source, destination in ((1, 2), (2, 1)):
        copies = handed_on(made, source, destination)
        data[f"{source} to {destination}"] = {
            "rows": forwarding_rows(copies),
            "digest": forwarding_digest(copies).hex(),
        }
    return pretty(data)


def bucket_hex() -> str:
    """Every message of version 3 in order, a line of 16 bytes each, then an abort."""
    made = plan()
    lines = []
    buckets = fill_buckets(made.to_rank(ENGINE_RANK), BUCKET_BYTES)
    for bucket in buckets:
        payload = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        pack(bucket, storages(bucket.source_rank), payload)
        header = Header(
            index=bucket.index,
            version=3,
            payload_bytes=bucket.nbytes,
            digest=digest(payload),
            plan=bytes.fromhex(made.digest(ENGINE_RANK))[:16],
            parts=len(bucket.parts),
        )
        lines.append(f"# bucket {bucket.index}, from trainer rank {bucket.source_rank}: header")
        lines += dump(header.pack())
        for part in bucket.parts:
            copy = part.copy
            scales = f", scale_inv at {part.scale_offset}" if part.scale_offset >= 0 else ""
            lines.append(f"# {copy.tensor} {copy.shape} {copy.dtype} at {part.offset}{scales}")
        lines += dump(bytes(payload.numpy()))
    plan_id = bytes.fromhex(made.digest(ENGINE_RANK))[:16]
    void = Header(
        index=0,
        version=4,
        payload_bytes=buckets[0].nbytes,
        digest=0,
        plan=plan_id,
        parts=len(buckets[0].parts),
        flags=ABORT,
    )
    lines.append("# header of a sender that failed: the payload, as long as ever, is void")
    lines += dump(void.pack())
    return "\n".join(lines) + "\n"


def dump(data: bytes) -> list[str]:
    return [data[i : i + 16].hex(" ") for i in range(0, len(data), 16)]


def pretty(data: Any) -> str:
    """JSON for reading: one line for each tensor, box or copy."""
    text = json.dumps(data, indent=1)
    return _join_lists(text) + "\n"


def _join_lists(text: str) -> str:
    """Put lists that stand one level inside another list on one line."""
    lines: list[str] = []
    depth = 0
    for line in text.splitlines():
        bare = line.strip()
        if depth > 1:
            lines[-1] += bare if bare[0] == "]" else ("" if lines[-1][-1] == "[" else " ") + bare
        else:
            lines.append(line)
        depth += line.endswith("[") - (bare in ("]", "],"))
    return "\n".join(lines)


def descriptor_json() -> str:
    """Names of the codes, and one row for each kind of work, at made-up addresses."""
    bf16, f32, u8 = torch.bfloat16, torch.float32, torch.uint8
    weight = Matrix(0x1_0000, 256, 384, 512, bf16)
    codes, scales = Matrix(0x9_0000, 256, 384, 384, u8), Matrix(0xA_8000, 2, 3, 3, f32)
    ragged, amax = Matrix(0x2_0002, 100, 77, 80, bf16), Matrix(0xB_0000, 2, 1, 1, f32)
    narrow = Matrix(0xC_0001, 100, 77, 77, u8)
    norm, wanted = Matrix(0xD_0000, 1, 5, 5, bf16), Matrix(0xE_0000, 1, 5, 5, f32)
    jobs = {
        "quantize by pow2": job.quantize(weight, "pow2", codes, scales, Part(slot=2)),
        "quantize a part of blocks by fp32": job.quantize(
            ragged, "fp32", narrow, None, Part(1, 4096, 384), amax=amax, origin=(60, 0)
        ),
        "amax of a part of blocks": job.partial_amax(ragged, amax, Part(1), origin=(60, 0)),
        "canonical digest": job.canonical_digest(codes, scales, Part(3)),
        "copy": job.copy(weight, Matrix(0xF_0000, 256, 384, 384, bf16), Part(4)),
        "cast": job.cast(norm, wanted, Part(5, 16)),
    }
    table = build_table(jobs.values(), "cpu")
    data = {
        "columns": {column.name: column.value for column in Column},
        "ops": {op.name: op.value for op in Op},
        "dtypes": {dtype.name: dtype.value for dtype in Dtype},
        "paths": {path.name: path.value for path in InnerLoop},
        "rows": [[name, *row] for name, row in zip(jobs, table.rows.tolist(), strict=True)],
    }
    return pretty(data)


FILES = {
    "manifest.json": manifest_json,
    "plan.json": plan_json,
    "forward.json": forward_json,
    "bucket.hex": bucket_hex,
    "descriptor.json": descriptor_json,
}
