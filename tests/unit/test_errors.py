"""Errors cross a wire as data and arrive as themselves."""

from __future__ import annotations

import json

import pytest

import fp8sync
from fp8sync import errors
from fp8sync.errors import Fp8SyncError, from_wire

FAMILY = [getattr(errors, name) for name in errors.__all__ if name[0].isupper()]


@pytest.mark.parametrize("kind", FAMILY)
def test_an_error_survives_the_wire(kind: type[Fp8SyncError]) -> None:
    error = kind("what happened", ["w: expected 1, found 2", "v: expected ‖x‖, found NaN"])
    again = from_wire(json.loads(json.dumps(error.to_wire())))
    assert type(again) is kind
    assert again.violations == error.violations
    assert str(again) == str(error)
    assert again.severed is kind.severed
    assert from_wire({"kind": kind.__name__}).severed is kind.severed


SEVERED = {errors.TransferTimeout, errors.EngineLost, errors.EngineUnusable}


def test_a_link_is_kept_unless_messages_may_be_missing() -> None:
    assert {kind for kind in FAMILY if kind.severed} == SEVERED


@pytest.mark.parametrize("severing", [{1}, {2}, {1, 2}, set()])
def test_what_severs_is_known_behind_what_is_said_first(severing: set[int]) -> None:
    """Over the wire, too, and under another name."""
    first = errors.InstallFailed("engine rank 0: no memory left")
    rest = [(errors.EngineLost if n in severing else errors.PeerFailed)(str(n)) for n in (1, 2)]
    whole = errors.gathered([first, *rest])
    assert whole.severed is bool(severing)
    again = from_wire(json.loads(json.dumps(whole.to_wire())))
    for error in (again, again.named("another"), errors.gathered([again, first])):
        assert type(error) is errors.InstallFailed
        assert error.severed is bool(severing)
    assert again.named("another").violations == whole.violations
    assert not errors.InstallFailed("of another refit").severed


def test_the_text_lists_every_violation() -> None:
    error = Fp8SyncError("two faults", ["first", "second"])
    assert str(error) == "two faults\n  - first\n  - second"
    assert str(Fp8SyncError("alone")) == "alone"


@pytest.mark.parametrize("kind", ["", "KeyboardInterrupt", "Fp8SyncError", "os.system", None])
def test_only_known_kinds_are_made(kind: object) -> None:
    error = from_wire({"kind": kind, "summary": 5, "violations": [1, None]})
    assert type(error) is Fp8SyncError
    assert error.summary == "5"
    assert error.violations == ("1", "None")


def test_nothing_but_a_kind_is_needed() -> None:
    assert str(from_wire({"kind": "EngineLost"})) == ""


def test_the_family_is_public() -> None:
    for kind in FAMILY:
        assert getattr(fp8sync, kind.__name__) is kind
        assert issubclass(kind, Fp8SyncError)


def test_several_errors_become_one_that_says_all() -> None:
    first = errors.InstallFailed("engine rank 0: no memory left", ["a", "b"])
    others = [
        errors.InstallFailed("engine rank 1: does not fit", ["c"]),
        errors.EngineLost("engine rank 2 is gone"),
    ]
    assert errors.gathered([first]) is first
    whole = errors.gathered([first, *others])
    assert type(whole) is errors.InstallFailed
    assert whole.summary == first.summary
    assert whole.violations == (
        "a",
        "b",
        "engine rank 1: does not fit: c",
        "engine rank 2 is gone",
    )
