"""Tiny tensors: threads of their own cost more than they give, and still they are to go in many parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8sync.sending.writer.LEAST_BYTES", 1)
    monkeypatch.setattr("fp8sync.sending.writer.STRIP_BYTES", 1 << 17)
