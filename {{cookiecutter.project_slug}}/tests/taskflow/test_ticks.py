"""When schedules are due, as tables; and a year in several zones against an oracle that watches the clocks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from time import perf_counter
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.taskflow.errors import BadSchedule, TaskflowError
from app.taskflow.scheduler import next_tick
from app.taskflow.ticks import GRACE, MISFIRE_CAP, Cron, Every, Misfire, Trigger, due_ticks, make_trigger

STEP = timedelta(minutes=5)
"""How often the oracle looks at the clocks. They are moved by half an hour or more."""
Matches = Callable[[datetime], bool]


def at(text: str) -> datetime:
    """A time in UTC, or in the offset that the text names."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def ticks_of(trigger: Trigger, start: str, end: str) -> list[str]:
    """The ticks after `start` up to `end`, as UTC texts to the minute."""
    found, last = [], at(end)
    tick = trigger.next_tick(at(start))
    while tick <= last:
        found.append(f"{tick:%m-%d %H:%M}")
        tick = trigger.next_tick(tick)
    return found


# -- intervals


@pytest.mark.parametrize(
    ("every", "after", "tick"),
    [
        (60, "2026-01-01T00:00:00", "2026-01-01T00:01:00"),
        (60, "2026-01-01T00:00:59.999999", "2026-01-01T00:01:00"),
        (60, "2026-01-01T00:01:00.000001", "2026-01-01T00:02:00"),
        (0.01, "2026-01-01T00:00:00", "2026-01-01T00:00:00.010000"),
        (0.1, "2026-01-01T00:00:00.25", "2026-01-01T00:00:00.300000"),
        (timedelta(hours=6), "2026-01-01T05:00:00", "2026-01-01T06:00:00"),
        (7 * 86_400, "2026-01-01T00:00:00", "2026-01-08T00:00:00"),  # 1970-01-01 was a Thursday, too
        (86_400, "2026-03-29T00:00:00", "2026-03-30T00:00:00"),
        (90, "1969-12-31T23:59:00", "1970-01-01T00:00:00"),
    ],
)
def test_an_interval_is_due_at_its_multiples_since_the_epoch(every: float | timedelta, after: str, tick: str) -> None:
    assert Every.of(every).next_tick(at(after)) == at(tick)


@given(
    every=st.floats(0.01, 1e6),
    after=st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
)
def test_an_interval_never_drifts_and_its_ticks_are_what_it_counts(every: float, after: datetime) -> None:
    trigger = Every.of(every)
    ticks = [after]
    for _ in range(5):
        ticks.append(trigger.next_tick(ticks[-1]))
    assert {(later - earlier) // timedelta(microseconds=1) for earlier, later in pairwise(ticks[1:])} == {
        trigger.micros
    }
    found = trigger.ticks(after, ticks[-1], 3)
    assert (list(found.newest), found.total) == (ticks[-3:], 5)


@pytest.mark.parametrize(
    ("every", "text"),
    [
        (60, "every 60 s"),
        (0.25, "every 0.25 s"),
        (timedelta(days=1), "every 86400 s"),
        (1_000_000, "every 1000000 s"),
        (1 / 3, "every 0.333333 s"),
    ],
)
def test_an_interval_says_what_it_is(every: float | timedelta, text: str) -> None:
    assert Every.of(every).text == text


# -- cron in zones: what people expect on the days when clocks are moved


@pytest.mark.parametrize(
    ("cron", "zone", "start", "end", "ticks"),
    [
        # London, spring: 01:00 -> 02:00 on 2026-03-29. A skipped 01:30 is read with the offset before: 02:30 BST.
        ("30 1 * * *", "Europe/London", "2026-03-28", "2026-03-31", "03-28 01:30, 03-29 01:30, 03-30 00:30"),
        # Autumn: 02:00 -> 01:00 on 2026-10-25. Of the two 01:30 it is the first.
        ("30 1 * * *", "Europe/London", "2026-10-24", "2026-10-27", "10-24 00:30, 10-25 00:30, 10-26 01:30"),
        # New York, spring: there is no 02:30 on 2026-03-08. It becomes 03:30 of that day.
        ("30 2 * * *", "America/New_York", "2026-03-07", "2026-03-10", "03-07 07:30, 03-08 07:30, 03-09 06:30"),
        ("30 1 * * *", "America/New_York", "2026-11-01", "2026-11-03", "11-01 05:30, 11-02 06:30"),
        # Lord Howe moves its clocks by half an hour: 02:00 -> 02:30 on 2026-10-04, 02:00 -> 01:30 on 2026-04-05.
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03", "2026-10-05", "10-03 15:45, 10-04 15:15"),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-03 15:00", "2026-04-06", "04-04 14:45, 04-05 15:15"),
        # Sao Paulo, 2018-11-04: midnight itself was skipped.
        ("0 0 * * *", "America/Sao_Paulo", "2018-11-03", "2018-11-06", "11-03 03:00, 11-04 03:00, 11-05 02:00"),
        # Havana, 2026-03-08: midnight was skipped; 2026-11-01: 00:30 came twice.
        ("30 0 * * *", "America/Havana", "2026-03-08", "2026-03-10", "03-08 05:30, 03-09 04:30"),
        ("30 0 * * *", "America/Havana", "2026-11-01", "2026-11-03", "11-01 04:30, 11-02 05:30"),
        # Apia had no 2011-12-30: what was due on it comes a day later by the calendar, at once with that day's own.
        ("30 2 * * *", "Pacific/Apia", "2011-12-29", "2012-01-01", "12-29 12:30, 12-30 12:30, 12-31 12:30"),
        # No daylight saving, and an offset of half an hour.
        ("0 9 * * *", "Asia/Kolkata", "2026-03-28", "2026-03-30", "03-28 03:30, 03-29 03:30"),
        ("0 9 * * *", "UTC", "2026-03-28", "2026-03-30", "03-28 09:00, 03-29 09:00"),
        # Casablanca goes back for Ramadan (2026-02-15, 03:00 -> 02:00) and forward again (2026-03-22, 02:00 -> 03:00).
        ("30 2 * * *", "Africa/Casablanca", "2026-02-15", "2026-02-17", "02-15 01:30, 02-16 02:30"),
        ("30 2 * * *", "Africa/Casablanca", "2026-03-21 12:00", "2026-03-24", "03-22 02:30, 03-23 01:30"),
        # Both 02:30, which is skipped, and 03:30 fall on one instant: one tick.
        ("30 2,3 * * *", "America/New_York", "2026-03-08", "2026-03-09", "03-08 07:30"),
        # A skipped time keeps its distance: 02:50 is 03:50, later than 03:10.
        ("10,50 2,3 * * *", "America/New_York", "2026-03-08", "2026-03-09", "03-08 07:10, 03-08 07:50"),
        ("50 2 * * *", "America/New_York", "2026-03-08 07:10", "2026-03-09", "03-08 07:50"),
        # Every hour follows real time: both passes of 01:00 in autumn, and no 01:00 in spring.
        (
            "0 * * * *",
            "Europe/London",
            "2026-10-24 23:59",
            "2026-10-25 03:00",
            "10-25 00:00, 10-25 01:00, 10-25 02:00, 10-25 03:00",
        ),
        ("0 * * * *", "Europe/London", "2026-03-29", "2026-03-29 03:00", "03-29 01:00, 03-29 02:00, 03-29 03:00"),
        (
            "30 0-23 * * *",
            "America/New_York",
            "2026-11-01 05:00",
            "2026-11-01 07:45",
            "11-01 05:30, 11-01 06:30, 11-01 07:30",
        ),
        # Half past every hour in Lord Howe: 02:00 goes back to 01:30, so half past one comes twice in half an hour.
        (
            "30 * * * *",
            "Australia/Lord_Howe",
            "2026-04-04 13:30",
            "2026-04-04 16:30",
            "04-04 14:30, 04-04 15:00, 04-04 16:00",
        ),
        # A day that is far away, with clocks moved in between.
        ("0 * 1 7 *", "Europe/London", "2026-01-01", "2026-07-01 00:00", "06-30 23:00, 07-01 00:00"),
        ("0 0 29 2 *", "UTC", "2026-01-01", "2032-12-31", "02-29 00:00, 02-29 00:00"),
        ("0 12 L * *", "UTC", "2026-01-01", "2026-03-31", "01-31 12:00, 02-28 12:00"),
        ("0 12 * * 5#2", "UTC", "2026-01-01", "2026-02-28", "01-09 12:00, 02-13 12:00"),
        ("@daily", "UTC", "2026-01-01", "2026-01-03", "01-02 00:00, 01-03 00:00"),
    ],
)
def test_a_cron_expression_means_what_people_expect_in_its_zone(
    cron: str, zone: str, start: str, end: str, ticks: str
) -> None:
    assert ", ".join(ticks_of(Cron(cron, zone), start, end)) == ticks


def test_seconds_may_be_given_last() -> None:
    trigger = Cron("* * * * * */20")
    tick = at("2026-01-01T00:00:10.5")
    found = []
    for _ in range(4):
        tick = trigger.next_tick(tick)
        found.append(f"{tick:%H:%M:%S}")
    assert found == ["00:00:20", "00:00:40", "00:01:00", "00:01:20"]


def test_a_tick_is_strictly_later_and_in_utc_whatever_zone_the_question_has() -> None:
    after = datetime(2026, 7, 1, 9, 0, tzinfo=ZoneInfo("Europe/London"))
    tick = next_tick("0 9 * * *", "Europe/London", after)
    assert tick == at("2026-07-02T08:00:00")
    assert tick.tzinfo is UTC
    assert next_tick("0 9 * * *", "Europe/London", after - timedelta(microseconds=1)) == after


def test_a_question_without_zone_is_refused() -> None:
    with pytest.raises(BadSchedule, match="needs a time zone"):
        next_tick("0 9 * * *", "UTC", datetime(2026, 1, 1))


# -- a year of clocks

ZONES = {
    "Asia/Kolkata": 2026,
    "Europe/London": 2026,
    "America/New_York": 2026,
    "Australia/Lord_Howe": 2026,
    "America/Sao_Paulo": 2018,
    "America/Havana": 2026,
    "Pacific/Apia": 2011,
    "Africa/Casablanca": 2026,
}
NOMINAL: dict[str, Matches] = {
    "30 1 * * *": lambda t: (t.hour, t.minute) == (1, 30),
    "30 2 * * *": lambda t: (t.hour, t.minute) == (2, 30),
    "0 0 * * *": lambda t: (t.hour, t.minute) == (0, 0),
    "15 2 * * 1-5": lambda t: (t.hour, t.minute) == (2, 15) and t.weekday() < 5,
    "0 0 1 * *": lambda t: (t.day, t.hour, t.minute) == (1, 0, 0),
    "55 23 L * *": lambda t: (t.hour, t.minute) == (23, 55) and (t + timedelta(days=1)).day == 1,
    "0 */2 * * *": lambda t: t.hour % 2 == 0 and t.minute == 0,
    "*/10 0-4 * * 0": lambda t: t.hour < 5 and t.minute % 10 == 0 and t.weekday() == 6,
}
REAL: dict[str, Matches] = {
    "0 * * * *": lambda t: t.minute == 0,
    "*/15 * * * 0,6": lambda t: t.minute % 15 == 0 and t.weekday() >= 5,
    "5 * 28-31 * *": lambda t: t.minute == 5 and t.day >= 28,
}


@cache
def readings(zone_name: str) -> dict[datetime, datetime]:
    """What the clocks show through a year, and two days on either side of it."""
    zone, year = ZoneInfo(zone_name), ZONES[zone_name]
    instant, end = datetime(year, 1, 1, tzinfo=UTC) - timedelta(days=2), datetime(year + 1, 1, 3, tzinfo=UTC)
    found = {}
    while instant < end:
        found[instant] = instant.astimezone(zone).replace(tzinfo=None)
        instant += STEP
    return found


@cache
def first_shown(zone_name: str) -> dict[datetime, datetime]:
    """For every local time the instant at which it counts: when it is shown first, or would have been if the clocks
    had not been moved over it."""
    found: dict[datetime, datetime] = {}
    before: tuple[datetime, datetime] | None = None
    for instant, shown in readings(zone_name).items():
        if before is not None:
            skipped, since = before[1] + STEP, before[0] + STEP
            while skipped < shown:
                found.setdefault(skipped, since)
                skipped, since = skipped + STEP, since + STEP
        found.setdefault(shown, instant)
        before = instant, shown
    return found


def year_of(zone: str) -> tuple[datetime, datetime]:
    return datetime(ZONES[zone], 1, 1, tzinfo=UTC), datetime(ZONES[zone] + 1, 1, 1, tzinfo=UTC)


def computed(cron: str, zone: str) -> list[datetime]:
    trigger = Cron(cron, zone)
    start, end = year_of(zone)
    found = []
    tick = trigger.next_tick(start - timedelta(microseconds=1))
    while tick < end:
        found.append(tick)
        tick = trigger.next_tick(tick)
    return found


@pytest.mark.parametrize("cron", NOMINAL)
@pytest.mark.parametrize("zone", ZONES)
def test_each_local_time_of_a_year_is_due_exactly_once(zone: str, cron: str) -> None:
    start, end = year_of(zone)
    expected = {instant for shown, instant in first_shown(zone).items() if NOMINAL[cron](shown)}
    assert computed(cron, zone) == sorted(instant for instant in expected if start <= instant < end)


@pytest.mark.parametrize("cron", REAL)
@pytest.mark.parametrize("zone", ZONES)
def test_each_hour_of_a_year_is_due_whenever_the_clocks_show_it(zone: str, cron: str) -> None:
    start, end = year_of(zone)
    expected = [instant for instant, shown in readings(zone).items() if REAL[cron](shown)]
    assert computed(cron, zone) == [instant for instant in expected if start <= instant < end]


@pytest.mark.parametrize("zone", [zone for zone in ZONES if zone != "Pacific/Apia"])
def test_a_daily_job_runs_on_every_day_of_the_calendar_once(zone: str) -> None:
    for cron in ("30 1 * * *", "30 2 * * *", "0 0 * * *"):
        days = [tick.astimezone(ZoneInfo(zone)).date() for tick in computed(cron, zone)]
        assert len(days) == len(set(days))
        assert (days[-1] - days[0]).days == len(days) - 1


@settings(max_examples=150, deadline=None)
@given(
    zone=st.sampled_from(list(ZONES)),
    cron=st.sampled_from([*NOMINAL, *REAL]),
    seconds=st.integers(0, 364 * 86_400),
)
def test_the_next_tick_does_not_depend_on_where_the_question_starts(zone: str, cron: str, seconds: int) -> None:
    trigger = Cron(cron, zone)
    after = year_of(zone)[0] + timedelta(seconds=seconds)
    tick = trigger.next_tick(after)
    assert tick > after
    assert trigger.next_tick(after + (tick - after) / 2) == tick
    assert trigger.next_tick(tick - timedelta(microseconds=1)) == tick


# -- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "every, cron=.*exactly one"),
        ({"every": 1, "cron": "* * * * *"}, "every, cron=.*exactly one"),
        ({"every": 0}, "every=0: must be between"),
        ({"every": -5}, "every=-5: must be between"),
        ({"every": 0.001}, "every=0.001: must be between"),
        ({"every": float("nan")}, "every=nan"),
        ({"every": float("inf")}, "every=inf"),
        ({"every": 1e12}, "ten years"),
        ({"every": True}, "every=True: must be seconds"),
        ({"every": "60"}, "every='60': must be seconds"),
        ({"every": timedelta(days=-1)}, "must be between"),
        ({"cron": ""}, "cron=''"),
        ({"cron": "* * * *"}, "cron='[*] [*] [*] [*]'"),
        ({"cron": "61 * * * *"}, "out of range"),
        ({"cron": "a b c d e"}, "cron='a b c d e'"),
        ({"cron": 5}, "cron=5: must be a string"),
        ({"cron": "0 0 30 2 *"}, "ever due"),
        ({"cron": "0 0 31 4,6,9,11 *"}, "ever due"),
        ({"cron": "R * * * *"}, "could not agree"),
        ({"cron": "0 H(1-5) * * *"}, "could not agree"),
        ({"cron": "h/15 * * * *"}, "could not agree"),
        ({"cron": "0 0 1 1 * 0 2030"}, "a year is not supported"),
        ({"cron": "@reboot"}, "cron='@reboot'"),
        ({"cron": "0 0 * * *", "timezone": "Mars/Olympus"}, "timezone='Mars/Olympus'"),
        ({"cron": "0 0 * * *", "timezone": ""}, "timezone=''"),
        ({"cron": "0 0 * * *", "timezone": "America"}, "timezone='America'"),
        ({"cron": "0 0 * * *", "timezone": "../etc/passwd"}, "timezone="),
        ({"cron": "0 0 * * *", "timezone": None}, "timezone=None"),
        ({"every": 5, "timezone": "nowhere"}, "timezone='nowhere'"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused_naming_value_and_rule(options: dict[str, Any], words: str) -> None:
    given = {"every": None, "cron": None, "timezone": "UTC", **options}
    with pytest.raises(BadSchedule, match=words) as refusal:
        make_trigger(**given)
    assert isinstance(refusal.value, TaskflowError)
    assert isinstance(refusal.value, ValueError)


# -- ticks that were missed


@pytest.mark.parametrize("misfire", ["skip", "once", "all"])
@pytest.mark.parametrize("trigger", [Every.of(1), Cron("* * * * * *")], ids=["every", "cron"])
def test_ticks_within_the_grace_are_fired_whatever_the_policy(trigger: Trigger, misfire: Misfire) -> None:
    last = at("2026-01-01T00:00:00")
    due = due_ticks(trigger, last, last + timedelta(seconds=1, milliseconds=400), misfire)
    assert (due.ticks, due.missed, due.handled) == ((at("2026-01-01T00:00:01"),), 0, at("2026-01-01T00:00:01"))
    due = due_ticks(trigger, last, last + timedelta(seconds=2), misfire)
    assert due.ticks == (at("2026-01-01T00:00:01"), at("2026-01-01T00:00:02"))


@pytest.mark.parametrize(
    ("misfire", "fired", "missed"),
    [("skip", [], 5), ("once", ["05:00"], 4), ("all", ["01:00", "02:00", "03:00", "04:00", "05:00"], 0)],
)
@pytest.mark.parametrize("trigger", [Every.of(3600), Cron("0 * * * *")], ids=["every", "cron"])
def test_after_a_downtime_the_policy_decides(trigger: Trigger, misfire: Misfire, fired: list[str], missed: int) -> None:
    due = due_ticks(trigger, at("2026-01-01T00:00:00"), at("2026-01-01T05:30:00"), misfire)
    assert [f"{tick:%H:%M}" for tick in due.ticks] == fired
    assert (due.missed, due.handled) == (missed, at("2026-01-01T05:00:00"))


@pytest.mark.parametrize("trigger", [Every.of(1), Cron("* * * * * *")], ids=["every", "cron"])
def test_a_tick_of_this_moment_is_fired_although_older_ones_are_skipped(trigger: Trigger) -> None:
    now = at("2026-01-01T00:01:00.5")
    due = due_ticks(trigger, at("2026-01-01T00:00:00"), now, "skip")
    assert due.ticks == (at("2026-01-01T00:01:00"),)
    assert (due.missed, due.handled) == (59, at("2026-01-01T00:01:00"))


@pytest.mark.parametrize(
    ("trigger", "last"),
    [
        (Every.of(60), "2026-12-31T23:59:00"),
        (Cron("* * * * *"), "2026-12-31T23:59:00"),
        (Cron("* 3 * 1 *", "Europe/London"), "2026-01-31T03:59:00"),
    ],
    ids=["every", "cron", "january"],
)
def test_of_many_missed_ticks_the_newest_are_made_up_for(trigger: Trigger, last: str) -> None:
    due = due_ticks(trigger, at("2026-01-01T00:00:00"), at("2026-12-31T23:59:59"), "all")
    assert len(due.ticks) == MISFIRE_CAP
    assert due.ticks[-1] == due.handled == at(last)
    assert list(due.ticks) == sorted(set(due.ticks))
    assert due.missed >= MISFIRE_CAP


def test_nothing_is_due_before_the_first_tick() -> None:
    due = due_ticks(Every.of(60), at("2026-01-01T00:00:00"), at("2026-01-01T00:00:59"), "all")
    assert (due.ticks, due.missed, due.handled) == ((), 0, None)


@pytest.mark.parametrize("misfire", ["skip", "once", "all"])
@pytest.mark.parametrize(
    "trigger", [Every.of(0.01), Cron("* * * * * *"), Cron("*/5 9-17 * * 1-5", "Europe/London")], ids=lambda t: t.text
)
def test_a_year_of_downtime_costs_no_more_than_a_moment(trigger: Trigger, misfire: Misfire) -> None:
    began = perf_counter()
    due = due_ticks(trigger, at("2025-01-01T00:00:00"), at("2026-01-01T10:00:00.5"), misfire)
    assert perf_counter() - began < 2.0
    assert due.handled is not None
    assert due.handled > at("2026-01-01T09:59:00")
    assert len(due.ticks) <= MISFIRE_CAP + 1


def test_every_tick_of_the_shortest_interval_within_the_grace_is_fired() -> None:
    now = at("2026-01-01T00:00:05")
    assert len(due_ticks(Every.of(0.01), now - GRACE, now, "once").ticks) == 100
