"""uint8 messages between real processes: whole, in order, bounded in time, on loopback alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from fp8sync.errors import EngineLost, TransferTimeout
from fp8sync.transport import GlooGroup, Rendezvous
from tests import ports

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess

WAIT_S = 120.0
NAMES = {1: "engine rank 0"}


def pattern(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator)


def choice(port: int) -> dict[str, object]:
    names = ["trainer rank 0", "engine rank 0"]
    return {"host": "127.0.0.1", "port": port, "rank": 1, "names": names}


def groups(timeout_s: float = WAIT_S) -> tuple[Rendezvous, GlooGroup, GlooGroup]:
    """Both members of a group in this process, for what needs no second one."""
    rendezvous = Rendezvous("127.0.0.1", WAIT_S)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(GlooGroup.join, choice(rendezvous.port), timeout_s)
        trainer = GlooGroup(rendezvous.store, 0, 2, "127.0.0.1", timeout_s, NAMES)
        return rendezvous, trainer, joining.result()


def in_process(work: Callable[..., None], rendezvous: Rendezvous, *args: object) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=work, args=(rendezvous.port, *args), daemon=True)
    process.start()
    return process


def echo(port: int, lengths: list[int]) -> None:
    group = GlooGroup.join(choice(port), WAIT_S)
    for length in lengths:
        message = torch.zeros(length, dtype=torch.uint8)
        group.receive(message, 0)
        group.send(message ^ 0xFF, 0)


def die_on_the_first_message(port: int) -> None:
    group = GlooGroup.join(choice(port), WAIT_S)
    group.receive(torch.zeros(1, dtype=torch.uint8), 0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_messages_arrive_whole_and_in_order_in_another_process() -> None:
    lengths = [1, 64, 65, 100_003, 5 << 20]
    rendezvous = Rendezvous("127.0.0.1", WAIT_S)
    process = in_process(echo, rendezvous, lengths)
    group = GlooGroup(rendezvous.store, 0, 2, "127.0.0.1", WAIT_S, NAMES)
    for seed, length in enumerate(lengths):
        message = pattern(length, seed)
        group.send(message, 1)
        answer = torch.zeros(length, dtype=torch.uint8)
        group.receive(answer, 1)
        assert torch.equal(answer, message ^ 0xFF)
    process.join(WAIT_S)
    assert process.exitcode == 0


def test_a_killed_peer_is_lost_within_the_timeout() -> None:
    rendezvous = Rendezvous("127.0.0.1", WAIT_S)
    process = in_process(die_on_the_first_message, rendezvous)
    group = GlooGroup(rendezvous.store, 0, 2, "127.0.0.1", WAIT_S, NAMES)
    group.send(torch.zeros(1, dtype=torch.uint8), 1)
    process.join(WAIT_S)
    assert process.exitcode == -signal.SIGKILL
    began = time.monotonic()
    with pytest.raises(EngineLost, match="engine rank 0 is gone"):
        group.receive(torch.zeros(1 << 20, dtype=torch.uint8), 1)
    with pytest.raises(EngineLost, match="engine rank 0 is gone"):
        group.send(torch.zeros(64 << 20, dtype=torch.uint8), 1)
    assert time.monotonic() - began < WAIT_S / 2


def test_a_peer_that_is_killed_while_we_wait_is_lost() -> None:
    rendezvous = Rendezvous("127.0.0.1", WAIT_S)
    process = in_process(echo, rendezvous, [1, 1])
    group = GlooGroup(rendezvous.store, 0, 2, "127.0.0.1", WAIT_S, NAMES)
    message = torch.zeros(1, dtype=torch.uint8)
    group.send(message, 1)
    group.receive(message, 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(group.receive, message, 1)
        time.sleep(0.2)
        assert not waiting.done()
        process.kill()
        with pytest.raises(EngineLost, match="engine rank 0 is gone"):
            waiting.result(WAIT_S)


def test_a_silent_peer_is_a_timeout_that_names_it() -> None:
    _rendezvous, trainer, worker = groups(timeout_s=0.4)
    began = time.monotonic()
    with pytest.raises(TransferTimeout, match=r"engine rank 0 did not send a bucket within 0\.4 s"):
        trainer.receive(torch.zeros(8, dtype=torch.uint8), 1)
    assert 0.3 < time.monotonic() - began < 5
    del worker


def test_a_peer_that_takes_nothing_is_a_timeout_that_names_it() -> None:
    _rendezvous, trainer, worker = groups(timeout_s=0.4)
    large = torch.zeros(64 << 20, dtype=torch.uint8)
    with pytest.raises(TransferTimeout, match="trainer rank 0 did not take a bucket"):
        worker.send(large, 0)
    del trainer


def test_a_group_that_stays_incomplete_is_a_timeout() -> None:
    rendezvous = Rendezvous("127.0.0.1", 0.4)
    began = time.monotonic()
    with pytest.raises(TransferTimeout, match="the gloo group of 2 was not complete"):
        GlooGroup(rendezvous.store, 0, 2, "127.0.0.1", 0.4)
    assert time.monotonic() - began < 10


def test_a_rendezvous_that_is_not_there_is_a_timeout_that_names_it() -> None:
    port = ports.free()
    with pytest.raises(TransferTimeout, match=rf"127\.0\.0\.1:{port} did not answer within 0.4 s"):
        GlooGroup.join(choice(port), 0.4)


def test_a_group_lives_beside_a_default_group(tmp_path) -> None:
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        _rendezvous, trainer, worker = groups()
        message, answer = pattern(1000, 3), torch.zeros(1000, dtype=torch.uint8)
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(trainer.send, message, 1)
            worker.receive(answer, 0)
            sending.result()
        assert torch.equal(answer, message)
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections(kind="tcp")
    return {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}


def test_only_loopback_listens() -> None:
    before = listening()
    rendezvous, trainer, worker = groups()
    opened = listening() - before
    assert ("127.0.0.1", rendezvous.port) in opened
    assert {host for host, _ in opened} == {"127.0.0.1"}
    del trainer, worker
