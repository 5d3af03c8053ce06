"""A Megatron-Core trainer of several ranks, for torchrun in Megatron's own environment.

    python -m torch.distributed.run --nproc_per_node=2 -m tests.engines.megatron_trainer URL FOLDER RECIPE LAYOUT...

For each LAYOUT (`tp=2`; with `own=1`, with mappings that are no boxes; with `master=1`, from FP32 masters; with
`saved=1`, from a distributed checkpoint that the ranks write), loads FOLDER/LAYOUT/hf into a model so divided,
refits the server at URL from it and audits it, before and after one element of the last rank changes. A refit with
a NaN there follows. Writes FOLDER/LAYOUT/RANK.json, with the collectives that ran during a refit, and waits for
FOLDER/LAYOUT/seen.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import fp8sync
from fp8sync.sources.megatron import MegatronSource
from tests.megatron import cpu, distributed
from tests.megatron.loose import mapped_by, own_mappings
from tests.megatron.watch import Watch

LIMIT = timedelta(seconds=120)
COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(("all_", "gather", "broadcast", "reduce", "scatter"))
    and callable(getattr(dist, name))
]


def main(url: str, folder: Path, recipe: fp8sync.Recipe, layouts: list[str]) -> None:
    dist.init_process_group("gloo", timeout=LIMIT)
    cpu.import_bridge()
    from megatron.bridge import AutoBridge

    rank = dist.get_rank()
    engine = url if rank == 0 else None
    for layout in layouts:
        place = folder / layout
        axes = {axis: int(size) for axis, size in (a.split("=") for a in layout.split(","))}
        bridge = AutoBridge.from_hf_pretrained(str(place / "hf"))
        own, saved = axes.pop("own", 0), axes.pop("saved", 0)
        master = bool(axes.pop("master", 0))
        with mapped_by(own_mappings() if own else {}):
            chunks = cpu.build_chunks(bridge, axes)
            weights: list[torch.Tensor | None] = [p for chunk in chunks for p in chunk.parameters()]
            if master:
                chunks, weights = masters_of(chunks)
            model: Any = written(chunks, place / "saved") if saved else chunks
            asked = {"bridge": bridge, "master": master}
            fp8sync.refit(model, engine, recipe, **asked)  # makes the link
        with Watch(w for w in weights if w is not None) as watch, counted() as collectives:
            report = fp8sync.refit(model, engine, recipe, **asked)
        told = {"version": report.version, "bytes": report.bytes_sent}
        weights_sent = [fault for fault in watch.faults if fault.startswith("c10d")]
        told |= {"collectives": collectives, "weights_in_collectives": weights_sent}
        fp8sync.close(engine=engine)
        if not saved:
            source = MegatronSource(chunks, bridge, master=master)
            element = element_of(chunks, weights)
            last = rank == dist.get_world_size() - 1
            with fp8sync.connect(source, engine, recipe) as link:
                told["audits"] = audits(link, element, last=last)
                told["refused"] = refusal_of_nan(link, element, last=last)
        (place / f"{rank}.json").write_text(json.dumps(told))
        wait_for(place / "seen")


def masters_of(chunks: list[Any]) -> tuple[list[Any], list[torch.Tensor | None]]:
    """Give the model an optimizer, and leave the weights in its FP32 masters alone.

    They are divided among data-parallel ranks, flat; of some parameters a rank has nothing.
    """
    chunks, _ = cpu.with_optimizer(chunks, distributed=True)
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    for parameter in parameters:
        parameter.data.zero_()
    return chunks, [p.main_param for p in parameters]


def element_of(chunks: list[Any], weights: list[torch.Tensor | None]) -> torch.Tensor:
    """The first element of a projection that this rank has a part of."""
    names = [name for chunk in chunks for name, _ in chunk.named_parameters()]
    held = zip(names, weights, strict=True)
    found = next(w for n, w in held if w is not None and n.endswith("linear_fc2.weight"))
    return found.data.view(-1)[0]


@torch.no_grad()
def audits(link: Any, element: torch.Tensor, *, last: bool) -> list[Any]:
    """What an audit says, and what it says once the last rank's element has changed."""
    kept = element.clone()
    before = link.audit()
    if last:
        element += 1.0
    after = link.audit()
    element.copy_(kept)
    return [before.to_json(), after.to_json()]


@torch.no_grad()
def refusal_of_nan(link: Any, element: torch.Tensor, *, last: bool) -> list[str]:
    """What a refit says when the last rank's element is NaN."""
    kept = element.clone()
    if last:
        element.fill_(torch.nan)
    try:
        link.refit()
    except fp8sync.NonFiniteWeight as error:
        return [type(error).__name__, *error.violations]
    finally:
        element.copy_(kept)
    return []


def written(chunks: list[Any], folder: Path) -> str:
    """Let the ranks write a distributed checkpoint, and leave the weights in its files alone."""
    distributed.save(chunks, folder)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    return str(folder)


class counted:
    """Counts calls of every collective of torch.distributed, in all threads."""

    def __enter__(self) -> Counter[str]:
        found: Counter[str] = Counter()
        self._stack = ExitStack()

        def counting(name: str, real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                found[name] += 1
                return real(*args, **kwargs)

            return call

        for name in COLLECTIVES:
            self._stack.enter_context(patch.object(dist, name, counting(name, getattr(dist, name))))
        return found

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def wait_for(path: Path) -> None:
    ends = time.monotonic() + LIMIT.seconds
    while not path.exists():
        if time.monotonic() > ends:
            raise TimeoutError(f"{path} did not come")
        time.sleep(0.1)
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = fp8sync.Recipe.from_json(json.loads(sys.argv[3]))
    main(sys.argv[1], Path(sys.argv[2]), given, sys.argv[4:])
