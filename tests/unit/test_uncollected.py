"""Python's garbage collector while a trainer rank sends: it would walk all of a trainer's objects in between."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import torch

from fp8sync.link.member import Member
from fp8sync.sending.exchange import AmaxExchange
from fp8sync.sending.share import Sent


def test_it_rests_while_a_rank_reads_and_sends_and_goes_on_afterwards() -> None:
    found: list[bool] = []

    def note(*_: object) -> Sent:
        found.append(gc.isenabled())
        return Sent(0)

    source: Any = SimpleNamespace(prepare=note, storages=dict, release=note)
    member: Any = Member(source, 0)
    member._exchange = AmaxExchange((), 0, None, torch.device("cpu"))
    member._senders = [SimpleNamespace(send=note)]
    assert gc.isenabled()
    assert member.send(1, 0, note).error is None
    assert found == [False] * 3
    assert gc.isenabled()
