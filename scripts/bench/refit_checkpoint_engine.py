"""checkpoint-engine's `ParameterServer.update` on the mappings of `refit.py`.

    NCCL_NVLS_ENABLE=0 python scripts/bench/refit_checkpoint_engine.py [--cases "1 -> 1"] [--out FILE.jsonl]

It is a process group of its own kind, so it runs apart: one parameter server per GPU and, beside it, a
process that takes buckets as an engine's worker would and copies its boxes out of every full tensor. The
FP8 checkpoint lies in pinned host memory, dealt evenly over all servers; reading it off the trainer,
quantizing, registering and the first collective of metadata are not counted. Every byte is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import refit_peers
import refit_world
import torch
import torch.multiprocessing as mp
from refit_cases import CASES, Case

from fp8sync.layouts import manifest
from fp8sync.layouts.presets import PRESETS

NAME = "checkpoint-engine"


def main() -> None:
    """Run on as many GPUs as each case has ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["1 -> 1", "TP2 -> TP2.EP2"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for number, name in enumerate(options.cases):
        case = CASES[name]
        if case.ranks > torch.cuda.device_count():
            print(f"{name:26s} {NAME:18s} needs {case.ranks} GPUs")
            continue
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + 10 * number)}
        os.environ.update(environment, WORLD_SIZE=str(case.ranks))
        mp.spawn(serve, (name, options), case.ranks)


def serve(rank: int, name: str, options: argparse.Namespace) -> None:
    """One parameter server and its worker."""
    from checkpoint_engine.ps import ParameterServer
    from loguru import logger

    logger.remove()
    os.environ["RANK"] = str(rank)
    case = CASES[name]
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=work, args=(rank, name, theirs))
    worker.start()
    stage = _stage(rank, case, {}, device)
    tensors = {tensor: value.cpu() for tensor, value in stage.pairs(rank, case.ranks)}
    server = ParameterServer(auto_pg=False, gpu_count=case.ranks)
    server.init_process_group()
    server.register_checkpoint(NAME, named_tensors=tensors)
    del tensors
    server.gather_metas(NAME)
    assert ours.recv() == "ready"

    def request(paths: list[tuple[str, str]]) -> None:
        ours.send(paths)
        assert ours.recv() == "done"

    seconds = []
    for _ in range(options.repeats + 1):
        server.store_based_barrier()
        began = time.perf_counter()
        server.update(NAME, request)
        seconds.append(time.perf_counter() - began)
    ours.send(None)
    wrong = ours.recv()
    assert not wrong, f"{wrong} storages differ on worker {rank} after {name} by {NAME}"
    worker.join()
    if rank == 0:
        _print(name, seconds[1:], options.out)


def work(rank: int, name: str, pipe: Any) -> None:
    """Take every bucket, and say at the end how many storages differ."""
    import zmq
    from checkpoint_engine.worker import update_weights_from_ipc

    case = CASES[name]
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    uuid = f"GPU-{torch.cuda.get_device_properties(rank).uuid!s}"
    wanted = manifest(case.engine, PRESETS[case.model])
    staged: refit_world.Tensors = {}
    expected: refit_world.Tensors = {}
    engine_rank = rank - case.trainer.ranks
    if engine_rank >= 0:
        staged = refit_world.allocated(wanted, engine_rank, device)
        expected = refit_world.allocated(wanted, engine_rank, device)
        refit_world.fill(wanted, engine_rank, expected)
    load = _stage(rank, case, staged, device).load if staged else lambda _: None
    zmq_context = zmq.Context()
    pipe.send("ready")
    while (paths := pipe.recv()) is not None:
        update_weights_from_ipc(zmq_context, dict(paths)[uuid], rank, run=load)
        pipe.send("done")
    pipe.send(refit_world.differing(staged, expected) if staged else 0)


def _stage(
    rank: int, case: Case, staged: refit_world.Tensors, device: torch.device
) -> refit_peers.Stage:
    model = PRESETS[case.model]
    sides = manifest(case.trainer, model), manifest(case.engine, model)
    return refit_peers.Stage(rank, case.trainer.ranks, sides, {}, staged, device, (None, None))


def _print(name: str, seconds: list[float], out: Path | None) -> None:
    median = statistics.median(seconds)
    row = {"mapping": name, "way": NAME, "seconds": seconds, "median_s": median, "equal": True}
    print(f"{name:26s} {NAME:18s} {median:9.4f}  (equal)", flush=True)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
