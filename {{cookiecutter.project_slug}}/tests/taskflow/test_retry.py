"""When the next attempt is due, as tables."""

from __future__ import annotations

import math
from typing import Any

import pytest

from app.taskflow.models import TaskConfig
from app.taskflow.retry import LONGEST_DELAY, backoff_delay, seconds_until_retry


class Own(ConnectionError):
    pass


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({}, [0, 0, 0]),
        ({"delay": 2}, [2, 2, 2]),
        ({"delay": 1, "backoff": 2}, [1, 2, 4, 8, 16]),
        ({"delay": 0.5, "backoff": 3, "max_delay": 5}, [0.5, 1.5, 4.5, 5, 5]),
        ({"delay": 8, "backoff": 0.5}, [8, 4, 2, 1]),
        ({"delay": 10, "max_delay": 1}, [1, 1]),
    ],
)
def test_the_delay_grows_by_the_backoff_up_to_its_cap(options: dict[str, Any], waits: list[float]) -> None:
    config = TaskConfig(retries=9, **options)
    assert [backoff_delay(config, number) for number in range(len(waits))] == waits


@pytest.mark.parametrize(
    ("options", "retry", "wait"),
    [
        ({"delay": 1, "backoff": 2}, 5_000, LONGEST_DELAY),
        ({"delay": 1, "backoff": 1e300}, 2, LONGEST_DELAY),
        ({"delay": 1, "backoff": 2, "max_delay": 60}, 5_000, 60),
        ({"delay": 1e300, "max_delay": 1e300}, 0, LONGEST_DELAY),
        ({"delay": 0, "backoff": 2}, 5_000, 0),
    ],
)
def test_a_delay_beyond_all_numbers_stays_a_time_that_can_be_reached(
    options: dict[str, Any], retry: int, wait: float
) -> None:
    assert backoff_delay(TaskConfig(retries=9_999, **options), retry) == wait


def test_jitter_is_a_random_time_between_nothing_and_the_delay() -> None:
    config = TaskConfig(retries=9, delay=4, backoff=2, max_delay=10, jitter=True)
    asked: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        asked.append((low, high))
        return high / 4

    assert [backoff_delay(config, number, uniform=uniform) for number in range(3)] == [1, 2, 2.5]
    assert asked == [(0, 4), (0, 8), (0, 10)]
    assert all(0 <= backoff_delay(config, 0) <= 4 for _ in range(100))


@pytest.mark.parametrize(
    ("retry_on", "error", "wait"),
    [
        (None, ValueError(), 7),
        ((ConnectionError,), ConnectionError(), 7),
        ((ConnectionError,), Own(), 7),
        ((KeyError, ConnectionError), Own(), 7),
        ((ConnectionError,), ValueError(), None),
        (lambda error: True, ValueError(), 7),
        (lambda error: False, ValueError(), None),
        (lambda error: None, ValueError(), None),
        (lambda error: isinstance(error, KeyError), KeyError(), 7),
        (lambda error: 1.5, ValueError(), 1.5),
        (lambda error: 30, ValueError(), 30),
        (lambda error: 0, ValueError(), 0),
        (lambda error: 0.0, ValueError(), 0),
        (lambda error: -5, ValueError(), 0),
        (lambda error: math.inf, ValueError(), LONGEST_DELAY),
        (lambda error: 1e300, ValueError(), LONGEST_DELAY),
    ],
)
def test_retry_on_decides_which_errors_are_retried_and_may_say_when(
    retry_on: Any, error: Exception, wait: float | None
) -> None:
    assert seconds_until_retry(TaskConfig(retries=3, delay=7, retry_on=retry_on), error, 0) == wait


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"retries": -1}, "retries=-1"),
        ({"retries": 1.5}, "retries=1.5"),
        ({"delay": -1}, "delay=-1"),
        ({"delay": math.inf}, "delay=inf"),
        ({"delay": math.nan}, "delay=nan"),
        ({"backoff": 0}, "backoff=0"),
        ({"backoff": -2}, "backoff=-2"),
        ({"max_delay": 0}, "max_delay=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": -1}, "timeout=-1"),
        ({"timeout": math.inf}, "timeout=inf"),
        ({"executor": "fibre"}, "executor='fibre'"),
        ({"priority": "high"}, "priority='high'"),
        ({"priority": 2**31}, "priority=2147483648"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_where_it_is_written(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: must be"):
        TaskConfig(**options)
