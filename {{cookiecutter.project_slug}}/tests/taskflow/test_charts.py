"""Where the bars are: proportions, edges, and one line per attempt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta

import pytest

from app.taskflow.history import SPANS, Bar, Sums, bars
from app.taskflow.models import TaskEvent, TaskStatus
from app.taskflow.web import charts

from .test_views import NOW

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
    assert charts.throughput(bars(SPANS["1h"], NOW, []), 60, width=100, height=50) is None
    assert charts.sparkline([0.0, 0.0], width=80, height=20) == ""
    assert charts.sparkline([3.0], width=80, height=20) == ""


def ended(*minutes: dict[str, int]) -> list[Bar]:
    return [Bar(NOW + timedelta(minutes=n), Sums(Counter(counts))) for n, counts in enumerate(minutes)]


def test_throughput_stacks_how_tasks_ended_and_leaves_empty_bars_out() -> None:
    chart = charts.throughput(
        ended({"success": 3, "failed": 1}, {}, {"success": 2, "started": 9}), 60, width=30, height=96
    )
    assert chart is not None
    assert (chart.peak, chart.totals) == (4, {SUCCESS: 5, FAILED: 1})
    assert [(column.x, column.width) for column in chart.columns] == [(0, 8), (20, 8)]
    assert [(part.kind, part.n) for part in chart.columns[0].parts] == [("success", 3), ("failed", 1)]
    assert chart.last - chart.first == timedelta(minutes=3)
    for column in chart.columns:
        for part in column.parts:
            assert 0 <= part.at <= 96
            assert part.at + part.size <= 96.1


def test_a_sparkline_ends_at_the_edges_and_peaks_below_the_top() -> None:
    points = [tuple(map(float, point.split(","))) for point in charts.sparkline([0, 4, 2], width=80, height=20).split()]
    assert points == [(0, 19), (40, 1), (80, 10)]


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
