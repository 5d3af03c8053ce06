"""What trainer rank 0 says reaches the other ranks: whole, the latest, or the error in its place."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from fp8sync.errors import Fp8SyncError, TransferTimeout, UnsupportedLayout
from fp8sync.trainers import Opening, hear

if TYPE_CHECKING:
    from pathlib import Path

WAIT_S = 20.0


def rank_0(folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=2)
    for error in (UnsupportedLayout("no such engine", ["engine 1"]), KeyError("lost")):
        try:
            with Opening():
                raise error
        except (UnsupportedLayout, KeyError):
            pass
        dist.barrier()
    for said in ({"open": "here"}, {"link": "a"}):
        try:
            with Opening() as opening:
                opening.say(said)
                raise UnsupportedLayout("too late")
        except UnsupportedLayout:
            pass
        dist.barrier()
        dist.barrier()
    for number in range(8):  # of these, the other rank missed all but the last
        Opening().say({"number": number, "text": "x" * 10_000})
    dist.barrier()
    dist.barrier()
    with Opening() as opening:
        opening.say({"number": 9})


def rank_1(folder: str, answers: Any) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=1, world_size=2)
    heard: list[Any] = []
    for _ in range(2):
        heard.append(hear(WAIT_S))
        dist.barrier()
    for _ in range(2):
        dist.barrier()
        heard.append(hear(WAIT_S))
        dist.barrier()
    dist.barrier()
    heard.append(hear(WAIT_S))
    try:
        hear(0.3)
    except TransferTimeout as error:
        heard.append(str(error))
    dist.barrier()
    heard.append(hear(WAIT_S))  # one that timed out is not lost
    answers.put(heard)


def test_what_rank_0_says_is_heard(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    ranks = [
        context.Process(target=rank_0, args=(str(tmp_path),), daemon=True),
        context.Process(target=rank_1, args=(str(tmp_path), answers), daemon=True),
    ]
    for process in ranks:
        process.start()
    refused, failed, invited, linked, last, late, next_ = answers.get(timeout=250)
    for process in ranks:
        process.join(30)
    assert refused["error"] == UnsupportedLayout("no such engine", ["engine 1"]).to_wire()
    assert failed["error"] == Fp8SyncError("trainer rank 0 failed: KeyError('lost')").to_wire()
    assert invited["error"] == UnsupportedLayout("too late").to_wire()
    assert linked == {"link": "a"}  # those who have the link hear it there
    assert last == {"number": 7, "text": "x" * 10_000}
    assert "made no call to connect or refit within 0.3 s" in late
    assert next_ == {"number": 9}


def test_a_trainer_of_one_rank_has_nobody_to_tell() -> None:
    with Opening() as opening:
        opening.say({"number": 1})
