"""`golden` on a live engine: the bytes of the other way, which shares no routing and no kernel with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import fp8sync
from tests.engines import world

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_golden_brings_the_same_bytes(kind: str, tmp_path: Path) -> None:
    folder = world.write_config(world.tiny_model(kind, 1), tmp_path)
    llm = world.start_engine(folder, load_format="dummy")
    model, other = world.tiny_model(kind, 2), world.tiny_model(kind, 3)
    digests = []
    for transport in ("gloo", "golden"):
        fp8sync.connect(other, llm, world.recipe("blockwise"), transport="gloo").refit()
        before = world.live_bytes(llm)
        link = fp8sync.connect(model, llm, world.recipe("blockwise"), transport=transport)
        assert link.transport.startswith(transport)
        link.refit()
        digests.append(world.live_bytes(llm))
        assert digests[-1] != before
        link.close()
    assert digests[0] == digests[1]
    del llm
    world.forget_engines()
