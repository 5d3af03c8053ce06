"""What a trainer and an engine's host tell each other, when one of them is slow, gone or refuses."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from fp8sync.errors import EngineLost, TransferTimeout
from fp8sync.verify import host, orders

if TYPE_CHECKING:
    from pathlib import Path


def answer(folder: Path, number: int, **said: str) -> None:
    """Play the host: answer one order once it is there."""

    def wait() -> None:
        while orders.read(folder, "order.json")["number"] < number:
            time.sleep(0.01)
        orders.write(folder, "host.json", {"number": number, "where": "here", **said})

    threading.Thread(target=wait, daemon=True).start()


def test_orders_are_answered_by_number(tmp_path: Path) -> None:
    trainer = orders.Orders(tmp_path)
    answer(tmp_path, 1, url="http://127.0.0.1:1")
    assert trainer.serve({"model": "m"}) == "http://127.0.0.1:1"
    assert orders.read(tmp_path, "order.json") == {"number": 1, "settings": {"model": "m"}}
    answer(tmp_path, 2)
    trainer.stop()
    assert orders.read(tmp_path, "order.json")["settings"] is None
    answer(tmp_path, 3, failed="NotImplementedError: no MLA here")
    with pytest.raises(EngineLost, match="no MLA here"):
        orders.Orders(tmp_path).serve({"model": "m"})


def test_a_silent_host_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_HOST_S", 0.3)
    with pytest.raises(TransferTimeout, match="no engine host answered"):
        orders.Orders(tmp_path).about_host()


def test_a_folder_is_used_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A host that came late would follow orders of a trainer that is gone."""
    orders.write(tmp_path, "order.json", {"number": 4, "settings": None})
    with pytest.raises(SystemExit):
        host.main([str(tmp_path)])
    assert "was used before" in capsys.readouterr().err
