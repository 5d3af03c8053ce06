"""Which commit is taken, what is said of it, and how a worker's storages become portions."""

from __future__ import annotations

import pytest
import torch

import fp8sync
from fp8sync.engines.vllm.portions import memory_short, storages_by_portion
from fp8sync.engines.vllm.storage import EngineLayout, StorageSpec
from fp8sync.link.commit import choose_commit, half_installed, strategies_of
from fp8sync.manifest import Manifest, Placement, TensorInfo
from fp8sync.plan import Copy
from fp8sync.recipe import Encoding
from fp8sync.sending.ahead import look_ahead

SPEC = StorageSpec((100,), (1,), torch.float32)
"""400 bytes."""


def layout(*storages: str, **about: object) -> EngineLayout:
    return EngineLayout(Manifest({}), dict.fromkeys(storages, SPEC), **about)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "short", "expected"),
    [
        ("staged", {0: "no room"}, ("staged", "asked for")),
        ("in-place", {0: ""}, ("in-place", "asked for")),
        ("auto", {0: "", 1: ""}, ("staged", "it fits into memory")),
        ("auto", {0: "", 1: "no room"}, ("in-place", "engine rank 1: no room")),
    ],
)
def test_choice(wanted: str, short: dict[int, str], expected: tuple[str, str]) -> None:
    assert choose_commit(wanted, short) == expected


def test_how_modules_are_installed_is_said() -> None:
    alike = {"direct": 12, "process": 3, "unproven": {}}
    assert strategies_of([alike, alike]) == "12 direct, 3 by process"
    short = {"direct": 11, "process": 4, "unproven": {"lm_head": "OutOfMemoryError: no 9 bytes"}}
    assert strategies_of([alike, short]) == (
        "engine rank 0: 12 direct, 3 by process; engine rank 1: 11 direct, 4 by process; "
        "engine rank 1: lm_head by process as its proof failed: OutOfMemoryError: no 9 bytes"
    )


@pytest.mark.parametrize("option", ["recipe", "scales", "commit", "transport"])
def test_unknown_names_are_refused_before_the_engine_is_looked_at(option: str) -> None:
    with pytest.raises(ValueError, match=f"unknown {option} 'new'; known: "):
        fp8sync.connect(torch.nn.Linear(1, 1), object(), **{option: "new"})


def test_a_dead_engine_is_lost_and_a_live_one_unusable() -> None:
    cause = fp8sync.CorruptBucket("a bucket", ["bucket 3", "bucket 4"])
    error = half_installed(cause, 2, 7)
    assert type(error) is fp8sync.EngineUnusable
    assert "2 of 7 portions" in error.summary
    assert error.violations == ("a bucket", "bucket 3", "bucket 4")
    assert type(half_installed(fp8sync.EngineLost("gone"), 2, 7)) is fp8sync.EngineLost


def test_modules_stay_whole() -> None:
    found = storages_by_portion(layout("a.w", "b.w", "a.s", "c.w", "d.w", "e.w"), 1000)
    assert found == [["a.w", "a.s"], ["b.w", "c.w"], ["d.w", "e.w"]]
    assert storages_by_portion(layout("a.w", "b.w"), 10) == [["a.w"], ["b.w"]]


def test_what_vllm_needs_together_stays_together() -> None:
    shared = layout("embed.w", "b.w", "head.bias", aliases={"head.w": "embed.w"})
    assert storages_by_portion(shared, 10) == [["embed.w", "head.bias"], ["b.w"]]
    assert shared.only(["b.w"]).aliases == {}
    loaded = layout(
        "a.w", "b.w", "c.w", "misc/x", processed=frozenset({"b"}), open=frozenset({"c.w"})
    )
    assert storages_by_portion(loaded, 10) == [["a.w"], ["b.w", "c.w", "misc/x"]]
    # Derived weights alone (MLA) are no reason to keep their origins together.
    assert len(storages_by_portion(layout("a.w", "b.w", processed=frozenset({"a", "b"})), 10)) == 2


def test_scales_of_the_cache_come_with_the_misc_path() -> None:
    both = layout("a.w", "misc/k", kv_scales=frozenset({"attn"}))
    assert both.only(["a.w"]).kv_scales == frozenset()
    assert both.only(["misc/k"]).kv_scales == {"attn"}


def test_reserved_memory_is_never_short() -> None:
    huge = StorageSpec((1 << 60,), (1,), torch.float32)
    needs = EngineLayout(Manifest({}), {"a.w": huge})
    assert memory_short(needs, huge.nbytes, torch.device("cpu")) == ""
    assert "GB are free" in memory_short(needs, 0, torch.device("cpu"))
    assert memory_short(layout("a.w"), 0, torch.device("cpu")) == ""


def test_looking_ahead_sees_what_packing_would() -> None:
    """Plain tensors in the destination's dtype, where large values overflow; pairs by codes and scales."""
    info = TensorInfo("t", (256, 256), "float8_e4m3fn", Encoding.BLOCKWISE)
    weight = torch.ones(256, 256)
    weight[0, 0], weight[200, 200] = torch.nan, 1e30
    codes = torch.zeros(256, 256, dtype=torch.uint8)
    codes[1, 1] = 0x7F
    scales = torch.ones(2, 2)
    scales[1, 1] = torch.inf
    storages = {"w": weight, "c": codes.view(torch.float8_e4m3fn), "s": scales}

    def copy(storage: str, dtype: str, encoding: Encoding, **about: object) -> Copy:
        at = Placement(storage, 0, (256, 1))
        place = (0, at, 0, at, None)
        return Copy("t", (0, 0), info.shape, dtype, encoding, None, *place, **about)  # type: ignore[arg-type]

    scale_at = Placement("s", 0, (2, 1))
    cases = [
        (copy("w", "bfloat16", Encoding.PLAIN), 1),
        (copy("w", "float16", Encoding.PLAIN), 2),
        (copy("w", "float8_e4m3fn", Encoding.BLOCKWISE), 1),
        (copy("c", "float8_e4m3fn", Encoding.BLOCKWISE, source_scale_at=scale_at), 2),
    ]
    for made, expected in cases:
        (found,) = look_ahead(storages, [made])
        assert (found.tensor, found.nonfinite) == ("t", expected)
    assert look_ahead({"w": torch.ones(256, 256)}, [cases[0][0]]) == []
