"""A source that has to be made complete before it is read, and may be read once."""

from __future__ import annotations

import pytest
import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import Box, Manifest, Placement, TensorInfo
from fp8sync.sources import LiveSource
from fp8sync.sources.kv_scales import KvScaleSource


class Late:
    """Its weights arrive in `prepare`, as an all-gather's would, and may be read once."""

    def __init__(self) -> None:
        self._weights: list[dict[str, torch.Tensor]] = []
        self.error: Exception | None = None
        self.steps = 0

    def prepare(self) -> None:
        if self.error:
            raise self.error
        self.steps += 1
        self._weights = [{"w": torch.full((2,), float(self.steps))}]

    def manifest(self) -> Manifest:
        return Manifest.of([], {0: []})

    def storages(self) -> dict[str, torch.Tensor]:
        return self._weights.pop()


def test_storages_are_read_once_for_each_prepare() -> None:
    live = LiveSource(Late)
    for step in (1.0, 2.0):
        live.prepare()
        assert live.storages()["w"].tolist() == [step, step]
        assert live.storages() is live.storages()
    live.release()
    with pytest.raises(IndexError):
        live.storages()


def test_what_stops_prepare_is_raised_by_the_next_reader_until_it_succeeds() -> None:
    source = Late()
    live = LiveSource(lambda: source)
    source.error = UnsupportedLayout("no gather")
    live.prepare()
    for read in (live.manifest, live.storages):
        with pytest.raises(UnsupportedLayout, match="no gather"):
            read()
    source.error = None
    live.prepare()
    assert live.manifest().ranks == {0: ()}
    assert live.storages()["w"].tolist() == [1.0, 1.0]


def test_what_overlaps_is_refused_where_the_source_says_that_it_tiles() -> None:
    """Also with KV-cache scales beside it; a hole is refused of any source."""

    def held(*rects: tuple[int, int]) -> Manifest:
        ranks = {
            r: [Box("w", (a,), (n,), Placement("w", 0, (1,)))] for r, (a, n) in enumerate(rects)
        }
        return Manifest.of([TensorInfo("w", (8,), "bfloat16")], ranks)

    free, tiled = Late(), Late()
    tiled.tiles = True
    for source in (free, tiled, KvScaleSource(free, {}, 0), KvScaleSource(tiled, {}, 0)):
        live = LiveSource(lambda source=source: source)
        live.prepare()
        live.check(held((0, 4), (4, 4), (4, 4)))
        with pytest.raises(UnsupportedLayout, match=r"w: expected 8 elements of \[8\], found 7"):
            live.check(held((0, 4), (5, 3)))
        overlap = held((0, 5), (4, 4))
        if getattr(source, "tiles", False):
            with pytest.raises(UnsupportedLayout, match=r"w: .* found \[0:5\] and \[4:8\], which"):
                live.check(overlap)
        else:
            live.check(overlap)
