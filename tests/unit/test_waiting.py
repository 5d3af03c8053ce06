"""The host's own time is what is left of the wall's without waits, each counted once."""

from __future__ import annotations

import threading
import time

from fp8sync.waiting import HostTime, Laps, waiting


def test_waits_are_left_out_once_however_they_nest() -> None:
    began = time.perf_counter()
    host = HostTime()
    with waiting():
        time.sleep(0.05)
        with waiting():
            time.sleep(0.05)
    busy_until = time.perf_counter() + 0.05
    while time.perf_counter() < busy_until:
        pass
    seconds = host.seconds
    wall = time.perf_counter() - began
    assert 0.05 <= seconds <= wall - 0.1


def test_waits_of_other_threads_and_before_do_not_count() -> None:
    with waiting():
        time.sleep(0.05)
    host = HostTime()

    def wait() -> None:
        with waiting():
            time.sleep(0.05)

    other = threading.Thread(target=wait)
    other.start()
    other.join()
    assert host.seconds >= 0.05


def test_laps_cover_all_time_between_them() -> None:
    began = time.perf_counter()
    laps = Laps()
    time.sleep(0.02)
    laps.end("first")
    laps.end("second")
    assert list(laps.seconds) == ["first", "second"]
    assert 0.02 <= laps.seconds["first"] <= sum(laps.seconds.values())
    assert sum(laps.seconds.values()) <= time.perf_counter() - began
