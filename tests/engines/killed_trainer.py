"""Trainers that die: `killed_trainer server URL TRANSPORT`, `killed_trainer ranks FOLDER RANK` in the middle of sending,

`killed_trainer stopped URL CALL` where it would make a call to a server that it has stopped.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import fp8sync
from fp8sync.engines.vllm import Server
from fp8sync.sending.writer import PARTS
from tests import conftest as _environment  # noqa: F401  (sets it)
from tests.engines import serving, world

if TYPE_CHECKING:
    from collections.abc import Callable

BUCKET_BYTES = 1 << 16
TIMEOUT_S = 30.0


class LastWords:
    """A member's transport; the process is killed instead of sending its sixth bucket."""

    def __init__(self, group: Any) -> None:
        self._group, self._count = group, 0

    def send(self, message: torch.Tensor, to: int) -> None:
        self._count += 1
        if self._count > 5:
            die()
        self._group.send(message, to)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def connect(model: torch.nn.Module, engine: Any, transport: str = "gloo") -> Any:
    return fp8sync.connect(
        model,
        engine,
        world.recipe("blockwise-pow2"),
        transport=transport,
        bucket_bytes=BUCKET_BYTES,
        timeout_s=TIMEOUT_S,
    )


def double(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)


def to_server(url: str, transport: str) -> None:
    model = serving.models()[1]
    link = connect(model, url, transport)
    link.refit()
    double(model)
    (sender,) = link._conductor._member._senders
    if transport == "ipc":
        sender._launch = launched(sender._launch)
    else:
        sender._group = LastWords(sender._group)
    link.refit()


def launched(launch: Callable[..., None]) -> Callable[..., None]:
    """Killed when all parts lie in the engine's memory, and workers have heard of none."""
    left = PARTS

    def launch_once(*args: Any) -> None:
        nonlocal left
        launch(*args)
        left -= 1
        if not left:
            torch.cuda.synchronize()
            die()

    return launch_once


def tall(seed: int) -> torch.nn.Module:
    """A model that writes for seconds."""
    return world.tiny_model("dense", seed, max_position_embeddings=4096)


def of_stopped(url: str, name: str) -> None:
    """Killed by itself at the call of that name; `none`: at once told to refit, and killed by others."""
    link = fp8sync.connect(tall(2), url, world.recipe("blockwise-pow2"), timeout_s=TIMEOUT_S)
    print("connected", flush=True)
    sys.stdin.readline()
    if name != "none":
        setattr(Server, name, die)
    link.refit()


def of_two_ranks(folder: Path, rank: int) -> None:
    """Rank 1 dies; rank 0 says what it saw, goes on alone, and refits the same engine."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = world.tiny_model("dense", 1)
    llm = None
    if rank == 0:
        config = world.write_config(model, folder / "config")
        llm = world.start_engine(config, load_format="dummy", multiprocess=True)
    dist.barrier()
    link = connect(model, llm)
    link.refit()
    double(model)
    if rank == 1:
        (sender,) = link._followers[link._current]._member._senders
        sender._group = LastWords(sender._group)
        link.refit()
        return
    before = world.logprobs(llm)
    began = time.monotonic()
    result: dict[str, Any] = {"error": ""}
    try:
        link.refit()
    except fp8sync.Fp8SyncError as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["seconds"] = time.monotonic() - began
    result["kept"] = (world.logprobs(llm) - before).abs().max().item()
    link.close()
    dist.destroy_process_group()
    result["version"] = fp8sync.refit(model, llm, world.recipe("blockwise-pow2")).version
    result["moved"] = (world.logprobs(llm) - before).abs().max().item()
    fp8sync.close()
    world.stop_engine(llm)
    (folder / "rank0.json").write_text(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "server":
        to_server(*sys.argv[2:])
    elif sys.argv[1] == "stopped":
        of_stopped(*sys.argv[2:])
    else:
        of_two_ranks(Path(sys.argv[2]), int(sys.argv[3]))
