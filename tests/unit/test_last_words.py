"""What a peer has said before it hung up, and what it may say between any messages."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from fp8sync.control import Channel, Listener, Message
from fp8sync.engines.vllm.portions import Installed
from fp8sync.errors import Fp8SyncError

TOKEN, WAIT_S = "5ca1ab1e" * 4, 5.0


@pytest.fixture
def joined() -> tuple[Channel, Channel]:
    """The trainer's end, then the worker's."""
    listener = Listener(TOKEN, timeout_s=WAIT_S)
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(Channel.connect, "127.0.0.1", listener.port, TOKEN, WAIT_S)
        ends = listener.accept("engine worker 0 of 1"), worker.result()
    listener.close()
    return ends


def test_a_peer_has_hung_up_whose_last_words_are_not_read(joined: tuple[Channel, Channel]) -> None:
    trainer, worker = joined
    assert not worker.hung_up()
    trainer.send({"type": "prepare", "go": True})
    assert not worker.hung_up()
    trainer.close()
    assert worker.hung_up()
    assert worker.receive("prepare")["go"]
    worker.close()
    assert worker.hung_up()


def test_who_has_stopped_an_engine_is_heeded_between_any_messages(
    joined: tuple[Channel, Channel],
) -> None:
    trainer, worker = joined
    said: list[tuple[str, bool]] = []
    installed = Installed()

    def heed(message: Message) -> None:
        installed.heed(message)
        said.append((installed.stopped, installed.mixed))

    worker.heed = heed
    installed.mixed = True
    trainer.send({"type": "stopped", "by": "a", "whole": False})
    trainer.send({"type": "prepare", "go": True})
    assert worker.receive("prepare")["go"]
    assert said == [("a", True)]
    for message in ({"type": "stopped", "by": "b", "whole": True}, {"type": "version"}):
        trainer.send(message)
    trainer.send({"type": "stopped", "by": "", "whole": True})
    worker.drain()
    assert said[1:] == [("b", False), ("", False)]
    trainer.send({"type": "stopped", "by": "c", "whole": False})
    trainer.close()
    worker.drain()
    assert said[3:] == [("c", False)]
    worker.close()
    worker.drain()


def test_what_nobody_waits_for_any_more_is_passed_over(joined: tuple[Channel, Channel]) -> None:
    """Of the kind that is named; any other is out of turn, as ever."""
    trainer, worker = joined
    for message in ({"type": "written", "whole": True}, {"type": "progress", "left": 1}):
        trainer.send(message, [b"digests"] if "whole" in message else [])
    trainer.send({"type": "written", "whole": False})
    trainer.send({"type": "prepare", "go": False})
    assert worker.receive("prepare", late="written")["go"] is False
    trainer.send({"type": "written", "whole": True})
    with pytest.raises(Fp8SyncError, match="sent 'written', expected 'prepare'"):
        worker.receive("prepare")
    trainer.send({"type": "version"})
    with pytest.raises(Fp8SyncError, match="sent 'version', expected 'prepare'"):
        worker.receive("prepare", late="written")
