"""A member that fails takes, or sends, what is left all the same: nobody waits for it in vain."""

from __future__ import annotations

import time
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8sync.engines.vllm.intake import Faults
from fp8sync.errors import CorruptBucket, EngineLost, Fp8SyncError, PeerFailed, TransferTimeout
from tests.layouts import wire
from tests.layouts.test_forward import refit_of
from tests.layouts.test_ways import WAIT_S, two_and_two

if TYPE_CHECKING:
    from tests.layouts.test_ways import Refit

RECEIVING = "fp8sync.engines.vllm."


def fail_once(patch: pytest.MonkeyPatch, target: str, call: int) -> None:
    """Let one call of a function, of those that all members of this process make, run out of memory."""
    function = resolve_name(target)
    calls = iter(range(10_000))

    def fail(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise torch.OutOfMemoryError("no memory left")
        return function(*arguments, **named)

    patch.setattr(target, fail)


def the_next_arrives(refit: Refit, version: int) -> None:
    """What must not be seen any more is overwritten first."""
    for storages in refit.destination.values():
        for tensor in storages.values():
            tensor.zero_()
    sent, raised = refit.run(version)
    assert [s.error for s in sent] == [None] * len(sent)
    assert raised == [None] * len(raised)


@pytest.mark.parametrize(
    ("way", "target", "call"),
    [
        ("buckets", "buckets.unpack", 1),
        ("buckets", "buckets.digest", 3),
        ("grouped", "grouped.run_table", 1),
        ("grouped", "grouped.unpack_table", 2),
        ("golden", "golden.view", 1),
        ("golden", "golden.digest_of", 3),
        ("golden", "golden.GoldenReceiver._room", 3),
    ],
)
def test_a_worker_that_fails(way: str, target: str, call: int, monkeypatch: Any) -> None:
    """Its own error is raised, the trainer's ranks and the other worker are through as ever."""
    refit = two_and_two(way)
    began = time.monotonic()
    with monkeypatch.context() as patch:
        fail_once(patch, RECEIVING + target, call)
        sent, raised = refit.run(1)
    assert time.monotonic() - began < WAIT_S / 2
    assert [s.error for s in sent] == [None, None]
    assert [type(e) for e in raised if e] == [torch.OutOfMemoryError]
    the_next_arrives(refit, 2)
    assert not wire.differing(refit.destination, refit.wanted())


@pytest.mark.parametrize(
    ("way", "target"),
    [
        ("buckets", "sender.digest"),
        ("grouped", "grouped.run_table"),
        ("golden", "golden.view"),
        ("golden", "golden.GoldenSender._room"),
    ],
)
def test_a_trainer_rank_that_fails_half_way(way: str, target: str, monkeypatch: Any) -> None:
    """It sends what is left as void, and the other rank all that it has."""
    refit = two_and_two(way)
    began = time.monotonic()
    with monkeypatch.context() as patch:
        fail_once(patch, "fp8sync.sending." + target, 3)
        sent, raised = refit.run(1)
    assert time.monotonic() - began < WAIT_S / 2
    (error,) = (s.error for s in sent if s.error)
    assert str(error).endswith(" failed: OutOfMemoryError: no memory left")
    assert {type(e) for e in raised if e} == {PeerFailed}
    the_next_arrives(refit, 2)
    assert not wire.differing(refit.destination, refit.wanted())


@pytest.mark.parametrize(
    ("way", "target"),
    [
        ("buckets", "buckets.unpack"),
        ("buckets", "buckets.pack"),
        ("grouped", "relay.run_table"),
        ("grouped", "relay.unpack_table"),
    ],
)
def test_a_worker_that_fails_while_it_hands_on(way: str, target: str, monkeypatch: Any) -> None:
    refit = refit_of(way, "engines2")
    assert refit.run(1)[1] == [None, None]
    began = time.monotonic()
    with monkeypatch.context() as patch:
        fail_once(patch, RECEIVING + target, 1)
        raised = refit.forward(1)
    assert time.monotonic() - began < WAIT_S / 2
    assert "no memory left" in " ".join(map(str, raised))
    assert not any(isinstance(e, (TransferTimeout, EngineLost)) for e in raised)
    the_next_arrives(refit, 2)
    assert refit.forward(2) == [None, None]
    assert not wire.differing(refit.destination, refit.wanted())


def test_silent_trainer_ranks_cost_one_timeout() -> None:
    """By gloo: with the first wait that ends in vain it gives up all connections, so no other one follows."""
    limit_s = 4.0
    refit = two_and_two("buckets", limit_s)
    began = time.monotonic()
    taken = [
        refit.pool.submit(receiver.receive, 1, refit.destination[rank])
        for rank, receiver in refit.receivers.items()
    ]
    for each in taken:
        with pytest.raises(
            TransferTimeout, match="trainer rank 0 did not send a bucket within 4 s"
        ):
            each.result()
    assert limit_s <= time.monotonic() - began < 1.8 * limit_s


LATE, BAD = TransferTimeout("trainer rank 1 sent nothing"), CorruptBucket("bucket 2: digest")
MEMORY = torch.OutOfMemoryError("no memory left")


@pytest.mark.parametrize(
    ("errors", "kind", "text", "severed"),
    [
        ([BAD], CorruptBucket, "bucket 2: digest", False),
        ([LATE], TransferTimeout, "trainer rank 1 sent nothing", True),
        ([LATE, BAD], TransferTimeout, "trainer rank 1 sent nothing", True),
        ([BAD, LATE], CorruptBucket, "bucket 2: digest\n  - trainer rank 1 sent nothing", True),
        (
            [MEMORY, BAD, LATE],
            Fp8SyncError,
            "OutOfMemoryError: no memory left\n  - trainer rank 1 sent nothing",
            True,
        ),
    ],
)
def test_the_first_fault_is_raised_and_says_whether_messages_are_missing(
    errors: list[Exception], kind: type[Fp8SyncError], text: str, severed: bool
) -> None:
    faults = Faults()
    faults.settle()
    assert not faults
    for error in errors:
        faults.add(error)
    assert faults
    with pytest.raises(Fp8SyncError) as raised:
        faults.settle()
    assert (type(raised.value), str(raised.value)) == (kind, text)
    assert raised.value.severed is severed
