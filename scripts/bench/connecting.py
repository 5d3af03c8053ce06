"""What connecting costs on paper: encoding, parsing, planning and digesting manifests, in processor seconds.

    python scripts/bench/connecting.py --model qwen3-30b-a3b --trainer dp=64,fsdp=64 --engine tp=2

The collector rests, as while a link is made. Rank 0 encodes once whatever the number of its peers; what the
wire takes is not measured. Needs no torch and no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
import zlib
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fp8sync.control import framed
from fp8sync.layouts import manifest
from fp8sync.layouts.parse import parse_engine, parse_model, parse_trainer
from fp8sync.manifest import Manifest
from fp8sync.plan import Planner

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def timed(what: str, step: Callable[[], T]) -> T:
    """Run a step and print what it took of the processor."""
    began = time.process_time()
    found = step()
    print(f"{what}: {time.process_time() - began:.2f} s", flush=True)
    return found


def encoded(listed: Manifest) -> bytes:
    """A manifest as it travels."""
    return framed({"type": "source", "manifest": listed.to_json()})


def parsed(data: bytes) -> Manifest:
    """What its receiver makes of it."""
    text = zlib.decompress(data[4:]) if data[3] & 0x80 else data[4:]
    return Manifest.from_json(json.loads(text)["manifest"])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--trainer", default="dp=8,fsdp=8")
    parser.add_argument("--engine", default="tp=2")
    parser.add_argument("--part", choices=("lead", "follow"), default="lead")
    options = parser.parse_args()
    gc.disable()
    model = parse_model(options.model)
    source = manifest(parse_trainer(options.trainer), model)
    wanted = manifest(parse_engine(options.engine), model)
    boxes = [sum(map(len, side.ranks.values())) for side in (source, wanted)]
    print(f"{len(source.ranks)} -> {len(wanted.ranks)} ranks, {boxes[0]} and {boxes[1]} boxes")
    for side, listed in (("source", source), ("destination", wanted)):
        data = timed(f"encode {side}", partial(encoded, listed))
        print(f"{len(data) / 2**20:.2f} MiB")
        timed(f"parse {side}", partial(parsed, data))
    planner = timed("index", lambda: Planner(source, exchange_amax=True))
    rank = max(source.ranks) if options.part == "follow" else None
    plan = timed("plan", lambda: planner.plan(wanted, rank))
    print(f"{len(plan.copies)} copies, {len(plan.amax)} groups of amax")
    if rank is None:
        timed("digests", lambda: [plan.digest(to) for to in wanted.ranks])
    else:
        timed("digests", lambda: plan.share_digests(rank))
    timed("digest of amax", plan.amax_digest)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
