"""Where the bars are: proportions, edges, and one line per attempt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from app.taskflow.models import TaskEvent, TaskStatus
from app.taskflow.web import charts

from .test_views import NOW, TASK

FAILED, PENDING, SUCCESS = TaskStatus.FAILED, TaskStatus.PENDING, TaskStatus.SUCCESS


def test_parts_fill_the_bar_in_proportion() -> None:
    parts = charts.stacked({SUCCESS: 3, FAILED: 1, PENDING: 0}, 100)
    assert [(part.kind, part.at, part.size, part.n) for part in parts] == [("success", 0, 75, 3), ("failed", 75, 25, 1)]


def test_a_single_failure_among_many_is_still_seen() -> None:
    parts = charts.stacked({SUCCESS: 10**6, FAILED: 1}, 100, smallest=2)
    assert parts[-1].size >= 1.9
    assert parts[-1].at + parts[-1].size == pytest.approx(100, abs=0.2)


def test_nothing_is_no_bar() -> None:
    assert charts.stacked({SUCCESS: 0}, 100) == []
    assert charts.activity([], NOW, width=100, height=50, bars=10) is None


def test_activity_has_bars_of_a_round_length_up_to_now() -> None:
    tasks = [replace(TASK, created_at=NOW - timedelta(seconds=age), status=SUCCESS) for age in (0, 1, 1, 95)]
    chart = charts.activity(tasks, NOW, width=480, height=96, bars=48)
    assert chart is not None
    assert (chart.n, chart.peak, chart.step) == (4, 3, 5)
    assert chart.last > NOW
    assert chart.last - chart.first == timedelta(seconds=240)
    assert all(0 <= bar.x < 480 for bar in chart.bars)
    assert chart.totals == {SUCCESS: 4}


@pytest.mark.parametrize("age", [0, 0.001, 1, 59, 3_600, 86_400 * 400])
def test_every_task_is_inside_the_drawing(age: float) -> None:
    tasks = [replace(TASK, created_at=NOW - timedelta(seconds=age)), replace(TASK, created_at=NOW)]
    chart = charts.activity(tasks, NOW, width=480, height=96, bars=48)
    assert chart is not None
    for bar in chart.bars:
        for part in bar.parts:
            assert 0 <= part.at <= 96
            assert part.at + part.size <= 96.1
    assert sum(part.n for bar in chart.bars for part in bar.parts) == 2


def history(*steps: tuple[str, float] | tuple[str, float, int]) -> Sequence[TaskEvent]:
    """Events of (kind, seconds, attempt)."""
    return [
        TaskEvent(seq, "id", at(step[1]), step[0], step[2] if len(step) > 2 else None, "one", None, step[0])
        for seq, step in enumerate(steps)
    ]


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def test_a_waterfall_has_a_line_per_attempt_with_its_wait_and_its_run() -> None:
    events = history(
        ("accepted", 0), ("started", 10, 0), ("retrying", 20, 0), ("started", 50, 1), ("succeeded", 100, 1)
    )
    chart = charts.waterfall(events, at(500), width=100)
    assert chart is not None
    assert chart.seconds == 100
    first, second = chart.spans
    assert (first.attempt, first.wait_x, first.wait_width, first.run_x, first.run_width) == (1, 0, 10, 10, 10)
    assert (second.attempt, second.wait_x, second.wait_width, second.run_x, second.run_width) == (2, 20, 30, 50, 50)
    assert [(span.wait, span.run, span.kind, span.outcome) for span in chart.spans] == [
        (10, 10, "failed", "retrying"),
        (30, 50, "success", "succeeded"),
    ]


@pytest.mark.parametrize(
    ("steps", "outcomes"),
    [
        ([("accepted", 0)], ["waiting"]),
        ([("accepted", 0), ("started", 1, 0)], ["running"]),
        ([("accepted", 0), ("started", 1, 0), ("retrying", 2, 0)], ["retrying", "waiting"]),
        ([("accepted", 0), ("started", 1, 0), ("rescued", 2, 0), ("started", 3, 1)], ["rescued", "running"]),
        ([("accepted", 0), ("cancelled", 1)], []),
        ([("rejected", 0)], []),
        ([("rejected", 0), ("requeued", 5)], ["waiting"]),
        (
            [("accepted", 0), ("started", 1, 0), ("failed", 2, 0), ("requeued", 90), ("started", 91, 1)],
            ["failed", "running"],
        ),
        ([("started", 1, 4), ("interrupted", 2, 4)], ["interrupted"]),
        ([("accepted", 0), ("started", 1, 0), ("cancel_requested", 2, 0), ("cancelled", 3, 0)], ["cancelled"]),
        ([("accepted", 0), ("started", 1, 0), ("lease_lost", 3, 0)], ["running"]),
    ],
)
def test_every_history_can_be_drawn(steps: list[tuple[str, float]], outcomes: list[str]) -> None:
    chart = charts.waterfall(history(*steps), at(100), width=600)
    spans = chart.spans if chart else []
    assert [span.outcome for span in spans] == outcomes
    for span in spans:
        assert 0 <= span.wait_x <= 600
        assert 0 <= span.run_x + span.run_width <= 600.1


def test_a_short_attempt_after_a_long_wait_is_still_seen() -> None:
    events = history(("accepted", 0), ("started", 100_000, 0), ("succeeded", 100_000.001, 0))
    chart = charts.waterfall(events, at(200_000), width=600)
    assert chart is not None
    assert chart.spans[0].run_width == 3
    assert chart.spans[0].run_x == 597
