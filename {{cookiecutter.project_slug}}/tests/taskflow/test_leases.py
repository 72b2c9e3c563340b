"""When a lease has lapsed in the eyes of an observer: a table of what it saw, on a clock that the test moves."""

import pytest

from app.taskflow.backends.base import Pulse
from app.taskflow.leases import Watch

from .helpers import make_instance

LEASE = 30.0
INTERVAL = 5.0


def pulse(stamp: int, lease: float = LEASE, name: str = "other") -> Pulse:
    return Pulse(make_instance(name), stamp, lease)


def looks(times: list[float], stamps: list[int], lease: float = LEASE) -> list[float]:
    """The times at which it looked dead."""
    watch = Watch(LEASE, INTERVAL)
    return [time for time, stamp in zip(times, stamps, strict=True) if watch.look([pulse(stamp, lease)], time)]


def every(seconds: float, until: float, start: float = 1_000.0) -> list[float]:
    return [start + n * seconds for n in range(int(until / seconds) + 1)]


@pytest.mark.parametrize("lease", [6.0, 30.0, 60.0])
def test_it_has_lapsed_when_its_stamp_stayed_the_same_for_the_whole_of_it(lease: float) -> None:
    times = every(1, 2 * lease)
    assert looks(times, [7] * len(times), lease) == [time for time in times if time - times[0] >= lease]


def test_who_beats_is_alive_however_its_stamps_go() -> None:
    times = every(5, 600)
    assert looks(times, [n // 2 % 3 for n in range(1, len(times) + 1)]) == []


@pytest.mark.parametrize("gap", [16.0, 40.0, 4_000.0])
def test_an_observer_that_did_not_look_for_a_while_begins_anew(gap: float) -> None:
    before, after = every(5, 25), every(5, 60, start=1_025 + gap)
    dead = looks(before + after, [7] * len(before + after))
    assert dead == [time for time in after if time - after[0] >= LEASE]


def test_an_observer_that_could_not_write_begins_anew() -> None:
    watch = Watch(LEASE, INTERVAL)
    for time in every(5, 25):
        assert watch.look([pulse(7)], time) == []
    watch.restart()
    assert [bool(watch.look([pulse(7)], time)) for time in every(5, 35, start=1_030)] == [False] * 6 + [True] * 2


def test_each_is_judged_by_its_own_lease() -> None:
    watch = Watch(LEASE, INTERVAL)
    others = [pulse(1, 10, "short"), pulse(1, 20, "long")]
    found = [[item.instance.instance_id for item in watch.look(others, time)] for time in every(5, 20)]
    assert found == [[], [], ["short"], ["short"], ["short", "long"]]


def test_who_signed_off_is_dead_at_once_and_who_has_no_row_gets_a_whole_lease() -> None:
    assert looks([1_000.0], [7], lease=0) == [1_000.0]
    times = every(5, 35)
    assert looks(times, [0] * len(times), lease=0) == times[-2:]


def test_who_was_rescued_gets_another_whole_lease() -> None:
    watch = Watch(LEASE, INTERVAL)
    times = every(5, 30)
    assert [bool(watch.look([pulse(7)], time)) for time in times][-1]
    watch.forget(["other"])
    assert watch.look([pulse(7)], times[-1] + 5) == []
