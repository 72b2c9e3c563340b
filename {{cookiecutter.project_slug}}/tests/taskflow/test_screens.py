"""What the screens make of what the store says: facts alone, without a server."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from fastapi import HTTPException

from app.taskflow.history import Bar, Sums
from app.taskflow.models import Count, InstanceRecord, QueueState, TaskEvent, TaskStatus, Vitals
from app.taskflow.ticks import make_trigger
from app.taskflow.web import csv
from app.taskflow.web.navigation import NAVIGATION
from app.taskflow.web.pages import audit, dead, queues, schedules, workers
from app.taskflow.web.views import trigger_words

from .test_views import NOW, TASK

STATE = QueueState("mail", 4, None, False, None, pending=3, running=2)


def test_navigation_has_one_key_and_one_address_for_each_screen() -> None:
    assert len({entry.key for entry in NAVIGATION}) == len({entry.path for entry in NAVIGATION}) == len(NAVIGATION) == 7


# -- queues


def test_a_queue_is_as_busy_as_its_limit_says() -> None:
    counts = [Count("mail", "f", TaskStatus.FAILED, 1, 0.0), Count("mail", "f", TaskStatus.SUCCESS, 3, 0.0)]
    counts += [
        Count("mail", "f", TaskStatus.PENDING, 5, 0.0, delayed=2),
        Count("other", "f", TaskStatus.FAILED, 9, 0.0),
    ]
    (row,) = queues.facts([STATE], counts, {"mail": [Bar(NOW, Sums())]}, {"mail": NOW})
    assert (row.busy, row.failed, row.ended, row.delayed, row.oldest) == (0.5, 1, 4, 2, NOW)
    (row,) = queues.facts([replace(STATE, concurrency=None)], [], {}, {})
    assert (row.busy, row.spark, row.oldest) == (0.0, "", None)
    assert queues.facts([replace(STATE, running=9)], [], {}, {})[0].busy == 1.0


@pytest.mark.parametrize(
    ("text", "limit"), [("", None), ("  ", None), ("5", 5), (" 12 ", 12), ("2147483647", 2**31 - 1)]
)
def test_a_limit_is_a_number_or_none(text: str, limit: int | None) -> None:
    assert queues.limit_of("concurrency", text) == limit


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "2147483648", "٣", "9" * 50])
def test_what_is_no_limit_is_refused_with_its_name(text: str) -> None:
    with pytest.raises(HTTPException, match="concurrency=") as refused:
        queues.limit_of("concurrency", text)
    assert refused.value.status_code == 422


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"concurrency": 5}, {"concurrency": 20}, "concurrency 5 → 20"),
        ({"max_size": None}, {"max_size": 7}, "max size no limit → 7"),
        ({"concurrency": 5, "max_size": 1}, {"concurrency": 5, "max_size": None}, "max size 1 → no limit"),
        ({"paused": 0}, {"paused": True, "reason": "x"}, "paused no → yes"),
        ({"paused": True}, {"paused": False}, "paused yes → no"),
        (None, {"paused": True}, ""),
        ("broken", [], ""),
    ],
)
def test_a_change_says_from_what_to_what(before: object, after: object, words: str) -> None:
    assert queues.difference(before, after) == words


# -- schedules


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("every 60 s", "every minute"),
        ("every 90 s", "every 1 m 30 s"),
        ("every 0.5 s", "every 500 ms"),
        ("every 300 s", "every 5 m"),
        ("0 3 * * *", "every day at 03:00"),
        ("30 8 * * 1-5", "every weekday at 08:30"),
        ("0 8 * * MON-FRI", "every weekday at 08:00"),
        ("0 9 * * 1", "every Monday at 09:00"),
        ("0 9 * * 7", "every Sunday at 09:00"),
        ("0 9 * * fri", "every Friday at 09:00"),
        ("15 0 1 * *", "on day 1 of the month at 00:15"),
        ("5 * * * *", "every hour at :05"),
        ("* * * * *", "every minute"),
        ("*/15 * * * *", "every 15 minutes"),
        ("0 */6 * * *", "every 6 hours"),
        ("0 3 1 1 *", "0 3 1 1 *"),
        ("0 3 1 * 1", "0 3 1 * 1"),
        ("0,30 3 * * *", "0,30 3 * * *"),
        ("@daily", "@daily"),
    ],
)
def test_a_trigger_is_said_as_people_say_it(text: str, words: str) -> None:
    assert trigger_words(text) == words


def test_ticks_that_made_no_task_are_a_gap() -> None:
    trigger = make_trigger(60, None, "UTC")
    start = datetime(2026, 3, 1, 12, tzinfo=UTC)
    runs = [replace(TASK, run_at=start + timedelta(minutes=minute)) for minute in (0, 1, 4, 5)]
    assert [schedules.missed(*pair, trigger) for pair in pairwise(runs)] == [False, True, False]
    assert not schedules.missed(runs[1], runs[2], None)


# -- workers


def test_a_version_that_differs_and_a_process_that_is_lost_are_marked() -> None:
    one = InstanceRecord("a", "host", 1, "2", NOW, NOW, 4, 2)
    found = workers.facts(
        [one, replace(one, instance_id="b"), replace(one, instance_id="c", version="1", heartbeat=NOW - timedelta(60))],
        NOW,
    )
    assert [(row.instance.instance_id, row.alive, row.differs) for row in found] == [
        ("a", True, False),
        ("b", True, False),
        ("c", False, True),
    ]
    assert found[0].busy == 0.5
    assert workers.facts([replace(one, slots=0)], NOW)[0].busy == 0.0
    (told,) = workers.facts([replace(one, vitals=Vitals({"async": (2, 1_000), "thread": (0, 200)}))], NOW)
    assert told.busy_kinds == [("async", 2)]


# -- audit, dead letters


def event(kind: str, detail: object = None, task_id: str = "") -> TaskEvent:
    text = detail if isinstance(detail, str) or detail is None else json.dumps(detail)
    return TaskEvent(1, task_id, NOW, kind, None, "one", "ada", text)


@pytest.mark.parametrize(
    ("told", "subject", "detail", "why"),
    [
        (event("cancelled", None, "t-1"), "", "", ""),
        (event("dismissed", "known", "t-1"), "", "", "known"),
        (
            event("pause_queue", {"queue": "m", "before": {"paused": 0}, "after": {"paused": True, "reason": "x"}}),
            "queue m",
            "paused no → yes",
            "x",
        ),
        (event("bulk_dismiss", {"matching": "all", "done": 3, "reason": "old"}), "", "matching all, done 3", "old"),
        (event("pause_schedule", None, "schedule:a/b"), "schedule a/b", "", ""),
        (event("login", {"client": "::1"}), "", "client ::1", ""),
        (event("odd", "{broken"), "", "message {broken", ""),
    ],
)
def test_an_act_says_what_it_changed_and_why(told: TaskEvent, subject: str, detail: str, why: str) -> None:
    found = audit.act(told)
    assert (found.subject, found.detail, found.why) == (subject, detail, why)


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1"])
def test_a_cell_is_never_a_formula(cell: str) -> None:
    assert csv.line([cell]).lstrip('"').startswith("'")


def test_other_cells_stay_as_they_are() -> None:
    assert csv.line(["a,b", 'say "hi"', "two\nlines", "ada"]) == '"a,b","say ""hi""","two\nlines",ada\r\n'


@pytest.mark.parametrize("text", ["", "x", "1_", "_k", "99999999999999999999_k", "1_a\0"])
def test_what_is_no_place_among_dead_letters_is_refused(text: str) -> None:
    with pytest.raises(HTTPException, match="before="):
        dead.place_of(text)
