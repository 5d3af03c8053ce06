"""The NCCL group itself: whole messages, peers that stay away, fall silent or die, and a new start."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil
import pytest
import torch
import torch.multiprocessing as mp

from fp8sync.errors import EngineLost, TransferTimeout
from fp8sync.transport.nccl import NcclGroup, new_unique_id

pytestmark = pytest.mark.multigpu(2)

LIMIT_S = 3.0
NAMES = ["trainer rank 0", "engine rank 0"]
MORE_THAN_BUFFERED = 1 << 29
"""Bytes; of less, NCCL's own buffers take all, and a sender is done with a receiver that is gone."""


def pair(peer: Any, unique_id: str) -> Any:
    """Start the other member."""
    process = mp.get_context("spawn").Process(target=peer, args=(unique_id,), daemon=True)
    process.start()
    return process


def join(number: int, unique_id: str, timeout_s: float = 60.0) -> NcclGroup:
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return NcclGroup(unique_id, number, NAMES, device, timeout_s, loopback=True)


def pattern(number: int) -> torch.Tensor:
    values = torch.arange(5 << 20, device=f"cuda:{number}") * 2654435761
    return (values >> 7).to(torch.uint8)


def take(group: NcclGroup, count: int = 1) -> torch.Tensor:
    found = torch.zeros(5 << 20, dtype=torch.uint8, device="cuda:1")
    for _ in range(count):
        group.wait(group.exchange([], [(found, 0)]), [0], "send a bucket")
    return found


def taker(unique_id: str) -> None:
    assert torch.equal(take(join(1, unique_id)), pattern(1))


def dier(unique_id: str) -> None:
    take(join(1, unique_id))
    os.kill(os.getpid(), signal.SIGKILL)


def sleeper(unique_id: str) -> None:
    take(join(1, unique_id))
    time.sleep(3 * LIMIT_S)


def stranger(unique_id: str) -> None:
    time.sleep(3 * LIMIT_S)


def send(group: NcclGroup) -> None:
    group.wait(group.exchange([(pattern(0), 1)], []), [1], "take a bucket")


def listener(unique_id: str) -> None:
    group = join(1, unique_id)
    take(group)
    connections = psutil.Process().net_connections(kind="tcp")
    listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}, listening


def passes(peer: Any) -> None:
    unique_id = new_unique_id(loopback=True)
    process = pair(peer, unique_id)
    send(join(0, unique_id))
    process.join(60)
    assert process.exitcode == 0


def test_a_message_arrives_whole() -> None:
    passes(taker)


def test_only_loopback_listens() -> None:
    """In a process that has made no communicator before."""
    passes(listener)


@pytest.mark.parametrize("peer", [dier, sleeper])
def test_a_lost_peer_is_named_and_the_next_group_works(peer: Any) -> None:
    unique_id = new_unique_id(loopback=True)
    pair(peer, unique_id)
    group = join(0, unique_id)
    send(group)
    group._timeout_s = LIMIT_S
    began = time.monotonic()
    much = torch.zeros(MORE_THAN_BUFFERED, dtype=torch.uint8, device="cuda:0")
    with pytest.raises((TransferTimeout, EngineLost), match="engine rank 0"):
        group.wait(group.exchange([(much, 1)], []), [1], "take a bucket")
    assert time.monotonic() - began < 3 * LIMIT_S
    with pytest.raises(EngineLost, match="closed"):
        send(group)
    test_a_message_arrives_whole()


def test_a_member_that_does_not_come() -> None:
    unique_id = new_unique_id(loopback=True)
    pair(stranger, unique_id)
    with pytest.raises(TransferTimeout, match="engine rank 0 did not join the communicator"):
        join(0, unique_id, LIMIT_S)


def test_two_members_on_one_gpu_are_refused() -> None:
    unique_id = new_unique_id(loopback=True)
    pair(squatter, unique_id)
    with pytest.raises(EngineLost, match="engine rank 0"):
        join(0, unique_id, 20.0)


def squatter(unique_id: str) -> None:
    torch.cuda.set_device(0)
    with pytest.raises(EngineLost):
        NcclGroup(unique_id, 1, NAMES, torch.device("cuda", 0), 20.0, loopback=True)
