"""What a refit costs the sending host, tensor for tensor as many as Qwen3-30B-A3B has.

    python scripts/bench/host.py [--refits 20] [--one-by-one]

Needs no GPU. The model has all layers and experts of Qwen3-30B-A3B (18,867 HF tensors, 37,491 with their
scales), but small matrices, so that the reference kernels get through on a processor. What they take
counts as waiting, as a GPU's work would. Measured: reading the source, checking that nothing moved,
launching, taking digests, and the control messages with them. Experts lie in stacks, as in recent
transformers; with `--one-by-one` each is a storage of its own. Fails above the limit, which is for stacks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.layouts import EngineLayout, ModelShape, TrainerLayout, manifest
from fp8sync.manifest import Box, Manifest, Placement
from fp8sync.plan import build_plan
from fp8sync.sending.exchange import open_exchange
from fp8sync.sending.share import Share
from fp8sync.sending.writer import StagingPlace, Writer
from fp8sync.sources import LiveSource
from fp8sync.transport.memory import allocate, export_memory
from fp8sync.waiting import HostTime

if TYPE_CHECKING:
    from fp8sync.sending.share import Written

LIMIT_S = 2e-3
ALIGN = 256
SMALL = ModelShape(
    layers=48,
    hidden=128,
    intermediate=128,
    vocabulary=256,
    heads=1,
    kv_heads=1,
    head_dim=128,
    qk_norm=True,
    experts=128,
    expert_intermediate=128,
)


class Stacked:
    """A trainer of one rank whose experts lie in one storage per layer and projection, or one by one."""

    def __init__(self, listed: Manifest, *, one_by_one: bool) -> None:
        sizes: dict[str, int] = defaultdict(int)
        boxes = []
        for box in listed.ranks[0]:
            stem, _, last = box.tensor.partition(".experts.")
            stacked = last and not one_by_one
            storage = f"{stem}.experts.{last.partition('.')[2]}" if stacked else box.tensor
            strides = torch.empty(box.shape, device="meta").stride()
            boxes.append(
                Box(box.tensor, box.start, box.shape, Placement(storage, sizes[storage], strides))
            )
            sizes[storage] += torch.Size(box.shape).numel()
        self._manifest = Manifest.of(listed.tensors.values(), {0: boxes})
        self._storages = {n: torch.randn(size).to(torch.bfloat16) for n, size in sizes.items()}

    def manifest(self) -> Manifest:
        """Return one box per tensor."""
        return self._manifest

    def storages(self) -> dict[str, torch.Tensor]:
        """Return the weights, in a new mapping, as a module's source does."""
        return dict(self._storages)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--refits", type=int, default=20)
    parser.add_argument("--one-by-one", action="store_true")
    options = parser.parse_args()
    stacked = Stacked(manifest(TrainerLayout(), SMALL), one_by_one=options.one_by_one)
    source = LiveSource(lambda: stacked)
    source.prepare()
    engine = manifest(EngineLayout(), SMALL)
    plan = build_plan(source.manifest(), engine, exchange_amax=True)
    cpu = torch.device("cpu")
    offsets, used = offsets_of(engine)
    staging = allocate(used, cpu)
    place = StagingPlace(export_memory(staging), offsets)
    writer = Writer(share_of(source, plan, cpu), {0: place})
    seconds = []
    for version in range(options.refits + 1):
        host = HostTime()
        source.prepare()
        told: list[Written | None] = []
        sent = writer.send(version, told.append)
        messages = [json.dumps({"type": "written", "digests": written}) for written in told]
        source.release()
        seconds.append(host.seconds)
        assert sent.error is None, sent.error
    median = statistics.median(seconds[1:])
    nbytes = sum(map(len, messages))
    storages = len(stacked.storages())
    print(f"{len(plan.tensors)} tensors, {storages} storages, {nbytes} bytes of digests")
    print(
        f"host: first {seconds[0] * 1e3:.2f} ms, median of {options.refits}: {median * 1e3:.2f} ms"
    )
    assert options.one_by_one or median <= LIMIT_S, f"expected at most {LIMIT_S * 1e3:g} ms"


def share_of(source: LiveSource, plan: Any, device: torch.device) -> Share:
    """What the only rank sends; nothing is cut."""
    exchange = open_exchange(plan.amax, 0, device, lambda _: None)  # type: ignore[arg-type,return-value]
    return Share(source, 0, source.manifest(), plan, 60.0, exchange)


def offsets_of(engine: Manifest) -> tuple[dict[str, int], int]:
    """Where each storage of the only worker begins in its staging memory, and the bytes of all."""
    sizes: dict[str, int] = defaultdict(int)
    for box in engine.ranks[0]:
        for at, shape in ((box.at, box.shape), (box.scale_at, [-(-n // 128) for n in box.shape])):
            if at is not None:
                last = at.offset + sum((n - 1) * s for n, s in zip(shape, at.strides, strict=True))
                sizes[at.storage] = max(sizes[at.storage], 4 * (last + 1))
    offsets, used = {}, 0
    for name, size in sizes.items():
        offsets[name] = used
        used += -(-size // ALIGN) * ALIGN
    return offsets, used


if __name__ == "__main__":
    main()
