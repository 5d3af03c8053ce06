"""Two trainer ranks and one engine rank, each a process: `misc_ranks RANK PORT`.

Each trainer rank holds one half of a matrix that only the engine's loader can place. It prints by how much
its memory grew at the most while it sent; the engine rank prints whether the matrix arrived.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import TCPStore

from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.plan import Plan, build_plan, fill_buckets
from fp8sync.sending.exchange import open_exchange
from fp8sync.sending.sender import Sender
from fp8sync.sending.share import Share
from fp8sync.transport import GlooGroup
from fp8sync.wire.header import HEADER_BYTES
from fp8sync.wire.payload import unpack

ROWS, COLS = 2 * 20_480, 4_096  # 320 MiB in BF16, 160 of them on each rank
BUCKET_BYTES = 4 << 20
TIMEOUT_S = 60.0


def plan() -> tuple[Manifest, Plan]:
    at, half = Placement("w", 0, (COLS, 1)), ROWS // 2
    boxes = {r: [Box("w", (r * half, 0), (half, COLS), at)] for r in range(2)}
    source = Manifest.of([TensorInfo("w", (ROWS, COLS), "bfloat16")], boxes)
    wanted = TensorInfo("w", (ROWS, COLS), "bfloat16", misc="a transform")
    whole = Box("w", (0, 0), (ROWS, COLS), Placement("misc/w", 0, (COLS, 1)))
    return source, build_plan(source, Manifest.of([wanted], {0: [whole]}))


def shard(rank: int) -> torch.Tensor:
    pattern = (torch.arange(COLS) + 13 * rank) % 251
    return pattern.to(torch.bfloat16).repeat(ROWS // 2, 1)


def main(rank: int, port: int) -> None:
    store = TCPStore("127.0.0.1", port, 3, rank == 0, timedelta(seconds=TIMEOUT_S))
    group = GlooGroup(store, rank, 3, "127.0.0.1", TIMEOUT_S)
    listed, made = plan()
    if rank == 2:
        whole = torch.zeros(ROWS, COLS, dtype=torch.bfloat16)
        for bucket in fill_buckets(made.to_rank(0), BUCKET_BYTES):
            message = torch.empty(HEADER_BYTES + bucket.nbytes, dtype=torch.uint8)
            group.receive(message, bucket.source_rank)
            unpack(bucket, message[HEADER_BYTES:], {"misc/w": whole})
        arrived = torch.equal(whole, torch.cat([shard(0), shard(1)]))
        print(json.dumps({"arrived": arrived}))
        return
    held = {"w": shard(rank)}
    live: Any = SimpleNamespace(storages=lambda: held)
    exchange = open_exchange(made.amax, rank, torch.device("cpu"), lambda _: group)
    sender = Sender(
        Share(live, rank, listed, made, TIMEOUT_S, exchange), group, {0: 2}, BUCKET_BYTES
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmHWM")
    sent = sender.send(1, lambda _: None)
    grown = memory("VmHWM") - before
    print(json.dumps({"error": str(sent.error), "sent": sent.bytes, "grown": grown}))


def memory(field: str) -> int:
    """Bytes that Linux counts for this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
