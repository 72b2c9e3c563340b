"""What people type and read: searches, times and values as words."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.taskflow import failures
from app.taskflow.models import TaskEvent, TaskFilter, TaskRecord, TaskStatus
from app.taskflow.web import views
from app.taskflow.web.views import Search, parse_search

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
FAILED, PENDING, SUCCESS = TaskStatus.FAILED, TaskStatus.PENDING, TaskStatus.SUCCESS

TASK = TaskRecord(
    task_id="0192f3c1-0000-7000-8000-00000000abcd",
    func_name="charge_card",
    status=PENDING,
    queue="billing",
    priority=None,
    executor="async",
    source="manual",
    tags={},
    created_at=NOW - timedelta(seconds=60),
    run_at=NOW - timedelta(seconds=60),
    start_time=None,
    end_time=None,
    attempt=0,
    excused=0,
    max_attempts=4,
    error=None,
    stacktrace=None,
    arguments=None,
    result=None,
    progress=None,
    instance=None,
    idempotency_key=None,
    cancel_requested=False,
    retry_of=None,
)


# -- searches


@pytest.mark.parametrize(
    ("typed", "search"),
    [
        ("", Search()),
        ("   ", Search()),
        ("charge", Search(words=("charge",))),
        ("card declined", Search(words=("card", "declined"))),
        ('"card declined"', Search(words=("card declined",))),
        ("name:charge_card", Search(name="charge_card")),
        ("NAME:charge_card", Search(name="charge_card")),
        ('name:"a b"', Search(name="a b")),
        ("status:failed", Search(statuses=(FAILED,))),
        ("status:failed,pending status:FAILED", Search(statuses=(FAILED, PENDING))),
        ("queue:mail source:scheduled", Search(queue="mail", source="scheduled")),
        ("tag.tenant:acme tag.Tier:gold", Search(tags=(("tenant", "acme"), ("Tier", "gold")))),
        ("tag.a:b:c", Search(tags=(("a", "b:c"),))),
        ("since:24h until:2026-01-01", Search(since="24h", until="2026-01-01")),
        ("since:24h oops", Search(since="24h", words=("oops",))),
        ("id:0192f3 key:order-991", Search(id="0192f3", key="order-991")),
        ('error:"card declined" args:42', Search(error="card declined", args="42")),
        ("attempts:>1 group:9f86d081884c7d65", Search(attempts=">1", group="9f86d081884c7d65")),
        ("is:dismissed", Search(dismissed=True)),
        ("is:open", Search(dismissed=False)),
    ],
)
def test_a_search_is_understood(typed: str, search: Search) -> None:
    assert parse_search(typed, NOW) == search


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("status:done", "status:done: is one of pending"),
        ("color:red", "color: is no qualifier"),
        ("name:", "name: needs a value"),
        ("source:cron", "source:cron: is manual or scheduled"),
        ("since:yesterday", "since:'yesterday': expected an ISO 8601 time"),
        ("tag.:x", "is no qualifier"),
        ("attempts:many", "attempts:many: is a number"),
        ("is:lost", "is:lost: is dismissed or open"),
    ],
)
def test_what_is_not_understood_is_named_and_the_rest_searched_for(typed: str, problem: str) -> None:
    search = parse_search(f"{typed} queue:mail", NOW)
    assert problem in search.problems[0]
    assert replace(search, problems=()) == Search(queue="mail")


def test_a_search_can_be_typed_again() -> None:
    typed = 'status:failed name:"a b" tag.t:"x y" since:2h error:"no row" attempts:<3 is:open word "two words" "a:b"'
    search = parse_search(typed, NOW)
    assert parse_search(str(search), NOW) == search


def test_a_search_becomes_a_filter() -> None:
    search = parse_search("status:failed name:f queue:q tag.a:b since:1h card declined", NOW)
    assert search.filter(NOW) == TaskFilter(
        statuses=(FAILED,),
        func_name="f",
        queue="q",
        tags=(("a", "b"),),
        since=NOW - timedelta(hours=1),
        text="card declined",
    )


@pytest.mark.parametrize(
    ("typed", "window"),
    [("tag.a:b", False), ("tag.a:b tag.c:d since:1h", False), ("tag.a:b status:failed", True), ("tag.a:b word", True)],
)
def test_a_search_says_when_it_looks_through_the_newest_tasks_only(typed: str, window: bool) -> None:
    assert parse_search(typed, NOW).looks_through_all is window


def test_a_status_is_added_and_taken_out() -> None:
    search = Search(statuses=(FAILED,), name="f")
    assert search.toggled(SUCCESS).statuses == (FAILED, SUCCESS)
    assert search.toggled(FAILED) == Search(name="f")


def test_a_search_that_is_long_or_hostile_is_cut_not_refused() -> None:
    assert len(str(parse_search("x" * 10_000, NOW))) <= views.MOST_SEARCH_CHARACTERS
    assert "\0" not in str(parse_search("a\0b", NOW))
    assert len(parse_search(" ".join(f"tag.a:{n}" for n in range(100)), NOW).tags) == 20


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90m", NOW - timedelta(minutes=90)),
        ("24h", NOW - timedelta(days=1)),
        ("7d", NOW - timedelta(days=7)),
        ("2026-02-01", datetime(2026, 2, 1, tzinfo=UTC)),
        ("2026-02-01T10:00:00Z", datetime(2026, 2, 1, 10, tzinfo=UTC)),
        ("2026-02-01T10:00:00+02:00", datetime(2026, 2, 1, 8, tzinfo=UTC)),
        ("2026-02-01T10:00:00 02:00", datetime(2026, 2, 1, 8, tzinfo=UTC)),
    ],
)
def test_a_moment_is_iso_or_ago(text: str, moment: datetime) -> None:
    assert views.parse_moment(text, NOW) == moment


@pytest.mark.parametrize("text", ["", "now", "5y", "-1h", "1.5h", "999999d", "2026-13-01", "0001-01-01T00:00:00+14:00"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected an ISO 8601 time"):
        views.parse_moment(text, NOW)


# -- values


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, ""),
        (0.0, "0 ms"),
        (0.0012, "1.2 ms"),
        (0.0456, "46 ms"),
        (0.9, "900 ms"),
        (0.99996, "1 s"),
        (1.26, "1.3 s"),
        (9.96, "10 s"),
        (59.6, "1 m"),
        (61, "1 m 1 s"),
        (3_600, "1 h"),
        (3_725, "1 h 2 m"),
        (90_000, "1 d 1 h"),
        (86_400 * 1_000, "1,000 d"),
    ],
)
def test_a_duration_is_short(value: float | None, words: str) -> None:
    assert views.seconds(value) == words


@pytest.mark.parametrize(
    ("past", "words"),
    [(-3, "just now"), (4, "just now"), (5, "5 s ago"), (60, "1 m ago"), (7_199, "1 h ago"), (200_000, "2 d ago")],
)
def test_an_age_has_one_unit(past: float, words: str) -> None:
    assert views.age(NOW - timedelta(seconds=past), NOW) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (1_204, "1,204"), (999_999, "999,999"), (1_234_567, "1.23 M"), (12 * 10**9, "12.00 B")],
)
def test_a_large_number_is_short(value: int, words: str) -> None:
    assert views.short_number(value) == words


@pytest.mark.parametrize(
    ("part", "whole", "words"),
    [
        (0, 0, "0 %"),
        (0, 5, "0 %"),
        (5, 5, "100 %"),
        (1, 3, "33.3 %"),
        (1, 10**6, "< 0.1 %"),
        (10**6 - 1, 10**6, "> 99.9 %"),
    ],
)
def test_a_share_is_never_rounded_to_all_or_nothing(part: int, whole: int, words: str) -> None:
    assert views.percent(part, whole) == words


def test_a_time_of_another_day_says_which() -> None:
    assert views.day_clock(NOW, NOW) == "12:00:00"
    assert views.day_clock(NOW - timedelta(days=3), NOW) == "Feb 26, 12:00"
    assert views.full(NOW) == "2026-03-01 12:00:00.000 UTC"


# -- tasks in words


@pytest.mark.parametrize(
    ("changes", "known", "words"),
    [
        ({}, True, ""),
        ({}, False, "waits for a process that knows this function"),
        ({"run_at": NOW + timedelta(seconds=90)}, True, "starts in 1 m 30 s"),
        ({"run_at": NOW + timedelta(seconds=12), "attempt": 2}, True, "retry 2 of 3 in 12 s"),
        ({"run_at": NOW + timedelta(seconds=12), "attempt": 2, "excused": 2}, True, "starts in 12 s"),
    ],
)
def test_a_pending_task_says_what_it_waits_for(changes: dict[str, object], known: bool, words: str) -> None:
    assert views.waiting_for(replace(TASK, **changes), NOW, known=known) == words  # type: ignore[arg-type]


def test_waiting_and_running_are_measured_from_when_a_task_was_due() -> None:
    assert views.wait_seconds(TASK, NOW) == 60
    assert views.wait_seconds(replace(TASK, run_at=NOW + timedelta(seconds=5)), NOW) is None
    assert views.run_seconds(TASK, NOW) is None
    running = replace(TASK, status=TaskStatus.RUNNING, start_time=NOW - timedelta(seconds=20))
    assert (views.wait_seconds(running, NOW), views.run_seconds(running, NOW)) == (40, 20)


@pytest.mark.parametrize(
    ("status", "retry", "cancel"),
    [
        (PENDING, False, True),
        (TaskStatus.RUNNING, False, True),
        (SUCCESS, False, False),
        (FAILED, True, False),
        (TaskStatus.INTERRUPTED, True, False),
        (TaskStatus.CANCELLED, True, False),
        (TaskStatus.REJECTED, True, False),
    ],
)
def test_a_page_offers_what_the_status_allows(status: TaskStatus, retry: bool, cancel: bool) -> None:
    task = replace(TASK, status=status)
    assert (views.can_retry(task), views.can_cancel(task)) == (retry, cancel)


@pytest.mark.parametrize(
    ("progress", "share"),
    [
        ({"done": 1, "total": 4}, 0.25),
        ({"done": 9, "total": 4}, 1.0),
        ({"done": 1}, None),
        ({"done": 1, "total": 0}, None),
        ({"done": "x", "total": 4}, None),
    ],
)
def test_progress_is_a_share_where_the_total_is_known(progress: dict[str, object], share: float | None) -> None:
    assert views.progress_share(progress) == share


TRACE = """Traceback (most recent call last):
  File "/srv/shop/app/taskflow/runner.py", line 102, in _outcome
    value = await executor.run(call)
  File "/srv/shop/app/tasks.py", line 41, in charge_card
    stripe.charge(order)
    ~~~~~~~~~~~~~^^^^^^^
  File "/srv/shop/.venv/lib/python3.11/site-packages/stripe/api.py", line 9, in post
    raise CardError()
app.billing.CardDeclined: insufficient funds
"""


def test_a_stacktrace_shows_the_teams_own_frames_first() -> None:
    (frame,) = failures.own_frames(TRACE, "/srv/shop/")
    assert (frame.path, frame.line, frame.where, frame.code) == (
        "app/tasks.py",
        "41",
        "charge_card",
        "stripe.charge(order)",
    )
    assert failures.own_frames(None, "/") == []


@pytest.mark.parametrize(("trace", "name"), [(TRACE, "CardDeclined"), ("KeyError\n", "KeyError"), (None, "")])
def test_an_error_has_the_name_of_its_class(trace: str | None, name: str) -> None:
    assert failures.error_type(trace) == name


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        ({"done": 40, "total": 100, "message": "reading"}, "40 of 100 · reading"),
        ({"done": 0, "total": 600}, "0 of 600"),
        ({"done": 3}, "3"),
        ({"message": "nearly"}, "nearly"),
        ({}, ""),
    ],
)
def test_progress_is_told_as_far_as_the_task_said_so(progress: dict[str, object], words: str) -> None:
    assert views.progress_words(progress) == words


@pytest.mark.parametrize(
    ("actor", "detail", "words"),
    [
        ("ada", '{"schedule": "send_digest"}', "schedule send_digest"),
        ("ada", '{"new_task_id": "0192", "note": null}', "new task id 0192"),
        ("ada", "no JSON", "no JSON"),
        ("ada", "[1]", "[1]"),
        ("ada", None, ""),
        (None, '{"code": 5}', '{"code": 5}'),
    ],
)
def test_what_people_did_is_told_in_words_and_an_error_as_it_is(
    actor: str | None, detail: str | None, words: str
) -> None:
    event = TaskEvent(1, "id", NOW, "run_schedule", None, None, actor, detail)
    assert views.event_detail(event) == words
