"""What charts remember: sums that add up over instances, restarts and buckets, on every store, and stay bounded."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.taskflow import TaskManager, TaskStatus
from app.taskflow.backends.base import GaugeRow, Record, TurnResult
from app.taskflow.history import (
    BOUNDS,
    KEPT,
    MOST_SERIES,
    OTHERS,
    SPANS,
    Book,
    Sums,
    bars,
    bucket_of,
    loads,
    quantile,
)
from app.taskflow.models import from_micros, to_micros, utc_now
from app.taskflow.recorder import latest
from app.taskflow.testing import drain

from .conftest import StartManager
from .helpers import START, Bench, eventually, make_finish

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 3, 1, 12, 34, 56, tzinfo=UTC)


# -- arithmetic


@given(st.lists(st.floats(0, 200_000), min_size=1), st.sampled_from([0.5, 0.95, 0.99]))
def test_a_quantile_is_between_the_bounds_around_the_true_one(values: list[float], share: float) -> None:
    found = quantile(Counter(map(bucket_of, values)), share)
    ordered = sorted(values)
    true = ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
    bucket = bucket_of(true)
    assert found is not None
    assert found <= (BOUNDS[bucket] if bucket < len(BOUNDS) else BOUNDS[-1] * 2)
    assert found >= (BOUNDS[bucket - 1] if bucket else 0)


def test_nothing_has_no_quantile() -> None:
    assert quantile({}, 0.95) is None


@given(st.dictionaries(st.sampled_from(["started", *TaskStatus]), st.integers(0, 10**9)))
def test_sums_come_back_as_they_were_stored(counts: dict[str, int]) -> None:
    sums = Sums(Counter(counts), Counter({3: 4}), Counter({0: 1}), 1.5, 0.25, {"pending": 3.0})
    found = loads(sums.dumps())
    assert (found.wait, found.run, found.run_seconds, found.levels) == (sums.wait, sums.run, 1.5, {"pending": 3.0})
    assert +found.counts == +sums.counts


@pytest.mark.parametrize("text", ["", "[]", "null", '{"c": 3}', '{"w": {"x": 1}}', "{"])
def test_a_row_that_cannot_be_read_counts_nothing(text: str) -> None:
    assert loads(text) == Sums()


@pytest.mark.parametrize("name", SPANS)
def test_bars_have_no_gaps_and_end_with_the_present_one(name: str) -> None:
    span = SPANS[name]
    start = span.start(NOW)
    found = bars(span, start, [])
    assert len(found) == span.bars
    assert found[-1].at <= NOW < found[-1].at + span.step
    assert {later.at - earlier.at for earlier, later in pairwise(found)} == {span.step}


def test_the_rows_of_all_instances_are_one_bar() -> None:
    span = SPANS["1h"]
    start = span.start(NOW)
    at = to_micros(NOW.replace(second=0))
    one = Sums(Counter({"success": 2}), levels={"pending": 7.0})
    rows = [GaugeRow(60, at, "all", "", one.dumps()), GaugeRow(60, at, "all", "", one.dumps())]
    last = bars(span, start, rows)[-1]
    assert last.sums.counts["success"] == 4
    assert last.sums.levels == {"pending": 7.0}


def test_of_several_rows_about_one_bucket_the_last_is_stored() -> None:
    rows = [GaugeRow(10, 0, "all", "", "1"), GaugeRow(10, 0, "queue", "a", "2"), GaugeRow(10, 0, "all", "", "3")]
    assert sorted(row.sums for row in latest(rows)) == ["2", "3"]


async def test_a_book_says_only_what_changed_and_all_of_it(bench: Bench) -> None:
    book = Book()
    await bench.add()
    (task,) = await bench.claim()
    book.turned([], TurnResult(claimed=[task]))
    assert {row.size for row in book.rows()} == set(KEPT)
    assert book.rows() == []
    book.turned([make_finish(task, TaskStatus.SUCCESS, bench.now + timedelta(seconds=1))], TurnResult())
    rows = {row[:4]: loads(row.sums) for row in book.rows()}
    hour = next(sums for key, sums in rows.items() if key[0] == 3_600 and key[2] == "all")
    assert hour.counts == {"started": 1, "success": 1}
    assert quantile(hour.run, 0.5) == pytest.approx(1.0, rel=0.6)


async def test_names_beyond_a_number_share_one_series(bench: Bench) -> None:
    book = Book()
    await bench.add()
    (task,) = await bench.claim()
    for number in range(MOST_SERIES + 50):
        book.turned([], TurnResult(claimed=[task._replace(name=f"job-{number}")]))
    rows = [row for row in book.rows() if row.size == 10 and row.kind == "name"]
    assert len(rows) == MOST_SERIES + 1
    assert loads(next(row for row in rows if row.series == OTHERS).sums).counts["started"] == 50
    assert len(book.totals) == MOST_SERIES + 1


# -- on every store


async def test_a_row_replaces_what_its_instance_said_before_and_adds_to_others(bench: Bench) -> None:
    other = Bench(bench.backend, "two")
    now = bench.now = other.now = utc_now().replace(microsecond=0)  # Redis forgets by its own clock
    at = to_micros(now.replace(second=0))
    kept = {size: now - keep for size, keep in KEPT.items()}

    def row(n: int, kind: str = "all", series: str = "") -> GaugeRow:
        return GaugeRow(60, at, kind, series, Sums(Counter({"success": n})).dumps())

    await bench.obey(Record([row(1), row(1, "name", "job")], kept))
    await bench.obey(Record([row(3)], kept))
    await other.obey(Record([row(10), row(2, "name", "mail:x")], kept))
    since = from_micros(at)
    found = await bench.backend.gauges(60, "all", since)
    assert sorted(loads(found_row.sums).counts["success"] for found_row in found) == [3, 10]
    assert {found_row.series for found_row in await bench.backend.gauges(60, "name", since)} == {"job", "mail:x"}
    (mail,) = await bench.backend.gauges(60, "name", since, "mail:x")
    assert (mail.at, mail.size) == (at, 60)
    assert await bench.backend.gauges(60, "all", since + timedelta(minutes=1)) == []
    assert await bench.backend.gauges(10, "all", since) == []


async def test_rows_are_forgotten_when_their_time_is_over(bench: Bench) -> None:
    now = bench.now = utc_now()
    old = to_micros(now - timedelta(days=1))
    kept = {10: now - timedelta(hours=2)}
    await bench.obey(Record([GaugeRow(10, old, "all", "", "{}"), GaugeRow(10, to_micros(now), "all", "", "{}")], kept))
    await bench.obey(Record([], kept))
    assert len(await bench.backend.gauges(10, "all", now - timedelta(days=2))) <= 1


async def test_the_oldest_waiting_task_is_found_behind_any_priority(bench: Bench) -> None:
    for priority, seconds in ((5, 3), (None, 9), (7, 1), (-2, 6)):
        bench.now = START + timedelta(seconds=seconds)
        await bench.add(priority=priority)
    bench.now = START + timedelta(seconds=20)
    await bench.add(queue="slow")
    await bench.add(queue="slow", run_at=bench.now + timedelta(hours=1))
    found = await bench.backend.oldest(["default", "slow", "nobody's"])
    assert found == {"default": START + timedelta(seconds=1), "slow": bench.now}
    assert await bench.backend.oldest([]) == {}


# -- the whole


def define(manager: TaskManager) -> None:
    @manager.task
    def works() -> None: ...

    @manager.task
    def fails() -> None:
        raise ValueError("no")


async def test_what_was_done_is_in_the_charts_also_after_a_restart(start_manager: StartManager) -> None:
    first = await start_manager(define)
    for name in ("works", "works", "fails"):
        await first.enqueue(first.registry.named(name).function)
    await drain(first)
    await eventually(lambda: sum(sums.ended for sums in first.book.totals.values()) == 3)  # the book hears of it last
    await first.recorder.sample()
    await first.shutdown()

    second = await start_manager(define)
    await second.enqueue(second.registry.named("works").function)
    await drain(second)
    await eventually(lambda: sum(sums.ended for sums in second.book.totals.values()) == 1)
    await second.recorder.write()
    for span in SPANS.values():
        total = Sums()
        for bar in await second.store.history(span):
            total.add(bar.sums)
        assert (total.counts["started"], total.counts["success"], total.counts["failed"]) == (4, 3, 1)
    assert set(await second.store.lately("name")) == {"works", "fails"}
    assert (await second.store.lately("queue"))["default"].ended == 4
