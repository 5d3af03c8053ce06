"""What a refit costs the sending host, tensor for tensor as many as Qwen3-30B-A3B has.

    python scripts/bench/host.py [--refits 20] [--one-by-one]

Needs no GPU. The model has all layers and experts of Qwen3-30B-A3B (18,867 HF tensors, 37,491 with their
scales), but small matrices, so that the reference kernels get through on a processor. What they take
counts as waiting, as a GPU's work would. Measured: reading a torch module, looking up where its tensors
lie, launching, taking digests, and the control messages with them; by itself also reading alone, for which
a GPU would wait. Experts lie in stacks, as in recent transformers; with `--one-by-one` each projection is a
module of its own. Fails above the limit, which is for stacks.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fp8sync.collector import uncollected
from fp8sync.control import framed
from fp8sync.layouts import EngineLayout, ModelShape, TrainerLayout, manifest
from fp8sync.plan import build_plan
from fp8sync.sending.exchange import open_exchange
from fp8sync.sending.share import Share
from fp8sync.sending.writer import StagingPlace, Writer
from fp8sync.sources import LiveSource, as_source
from fp8sync.transport.memory import allocate, export_memory
from fp8sync.waiting import HostTime

if TYPE_CHECKING:
    from fp8sync.manifest import Manifest
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


def as_module(listed: Manifest, *, one_by_one: bool) -> nn.Module:
    """A torch module that is listed so: experts in two stacks per layer, or one by one."""
    root = nn.Module()
    for info in listed.tensors.values():
        stem, _, expert = info.name.partition(".experts.")
        if not expert or one_by_one:
            _put(root, info.name, info.shape)
        elif expert == "0.up_proj.weight":
            rows, cols = info.shape
            _put(root, f"{stem}.experts.gate_up_proj", (SMALL.experts, 2 * rows, cols))
            _put(root, f"{stem}.experts.down_proj", (SMALL.experts, cols, rows))
    return root


def _put(root: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    *path, last = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, nn.Parameter(torch.randn(shape).to(torch.bfloat16)))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--refits", type=int, default=20)
    parser.add_argument("--one-by-one", action="store_true")
    options = parser.parse_args()
    module = as_module(manifest(TrainerLayout(), SMALL), one_by_one=options.one_by_one)
    source = LiveSource(lambda: as_source(module))
    source.prepare()
    engine = manifest(EngineLayout(), SMALL)
    plan = build_plan(source.manifest(), engine, exchange_amax=True)
    cpu = torch.device("cpu")
    offsets, used = offsets_of(engine)
    staging = allocate(used, cpu)
    place = StagingPlace(export_memory(staging), offsets)
    writer = Writer(share_of(source, plan, cpu), {0: place})
    seconds, reading = [], []
    for version in range(options.refits + 1):
        source.prepare()
        host = HostTime()
        source.storages()
        reading.append(host.seconds)
        host = HostTime()  # in which the writer reads the module again
        told: list[Written | None] = []
        with uncollected():  # as a link sends
            sent = writer.send(version, told.append)
        messages = [framed({"type": "written"}, [*(written or {}).values()]) for written in told]
        source.release()
        seconds.append(host.seconds)
        assert sent.error is None, sent.error
    median, read = (statistics.median(s[1:]) for s in (seconds, reading))
    nbytes = sum(map(len, messages))
    storages = len(list(module.parameters()))
    print(f"{len(plan.tensors)} tensors, {storages} storages, {nbytes} bytes of digests")
    print(
        f"host: first {seconds[0] * 1e3:.2f} ms, median of {options.refits}: {median * 1e3:.2f} ms, "
        f"{read * 1e3:.2f} ms of it reading the module"
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
