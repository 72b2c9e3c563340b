"""Instances go by the clock of their store, as far as it differs from their own for sure."""

from datetime import UTC, datetime, timedelta

import pytest

from app.taskflow.clock import Clock, offset_of

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
NONE = timedelta(0)


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


@pytest.mark.parametrize(
    ("known", "ahead", "took", "becomes"),
    [
        pytest.param(0, 0.001, 0.002, 0, id="the same clock"),
        pytest.param(0, 60, 0.002, 60, id="a minute ahead"),
        pytest.param(0, -60, 0.002, -60, id="a minute behind"),
        pytest.param(60, 60.01, 0.002, 60, id="not moved by what asking takes"),
        pytest.param(60, 0, 0.002, 0, id="put right again"),
        pytest.param(0, 1, 4, 0, id="a slow answer says little"),
        pytest.param(60, 61, 0.002, 61, id="drifted"),
    ],
)
def test_an_offset_is_taken_where_it_is_sure(known: float, ahead: float, took: float, becomes: float) -> None:
    told = NOON + seconds(took / 2) + seconds(ahead)
    assert offset_of(seconds(known), NOON, told, NOON + seconds(took)) == seconds(becomes)


def test_the_clock_goes_by_the_offset_and_stands_still_when_it_is_frozen() -> None:
    clock = Clock(lambda: seconds(3_600))
    assert seconds(3_599) < clock() - datetime.now(UTC) <= seconds(3_600)
    clock.freeze(NOON)
    assert clock() == NOON
