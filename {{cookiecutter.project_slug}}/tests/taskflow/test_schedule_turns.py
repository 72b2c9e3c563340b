"""What a backend promises about schedules and one-offs, turn by turn, over every backend.

Part of the contract of `Backend`, like `test_backend_conformance.py`. Only the test of an upgrade knows SQL.
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.taskflow import TaskStatus
from app.taskflow.backends import Backend, open_backend
from app.taskflow.backends.base import (
    Answer,
    CancelScheduled,
    DeclaredSchedule,
    DeclareQueues,
    DeclareSchedules,
    Demand,
    Draft,
    EditSchedule,
    Fire,
    Firing,
    Purge,
    RunSchedule,
    Supersede,
    TurnResult,
)
from app.taskflow.backends.tables import SCHEMA_VERSION
from app.taskflow.models import EventKind, QueueConfig, ScheduledOnce, ScheduleState, TaskFilter, schedule_subject

from .helpers import START, Bench, all_tasks, assert_counters_match_rows, make_draft

pytestmark = pytest.mark.anyio

MINUTE = timedelta(minutes=1)


def declared(name: str = "job", **facts: Any) -> DeclaredSchedule:
    values = {"trigger": "every 60 s", "timezone": "UTC", "overlap": True, "misfire": "once"}
    return DeclaredSchedule(name=name, func_name=name, next_tick=START + MINUTE, **{**values, **facts})


async def declare(bench: Bench, *schedules: DeclaredSchedule) -> Answer:
    return await bench.obey(DeclareSchedules(schedules or (declared(),)))


def run_of(tick: datetime, name: str = "job", **facts: Any) -> Draft:
    draft = make_draft(name, task_id=f"{name}@{tick:%H:%M}", at=tick, source="scheduled", **facts)
    return draft._replace(schedule=name)


def firing(since: datetime, *ticks: datetime, name: str = "job", **facts: Any) -> Firing:
    until = ticks[-1] if ticks else since + MINUTE
    drafts = [run_of(tick, name) for tick in ticks]
    return Firing(
        **{"schedule": name, "since": since, "until": until, "next_tick": until + MINUTE, "drafts": drafts, **facts}
    )


async def fire(bench: Bench, *firings: Firing) -> Answer:
    return await bench.obey(Fire(firings))


async def state(bench: Bench, name: str = "job") -> ScheduleState:
    return next(state for state in await bench.backend.schedules() if state.name == name)


async def runs(bench: Bench, name: str = "job") -> list[datetime]:
    return sorted(task.run_at for task in await all_tasks(bench.backend, TaskFilter(schedule=name)))


async def skips(bench: Bench, name: str = "job") -> list[str]:
    events = await bench.backend.events(schedule_subject(name))
    return [event.detail or "" for event in events if event.kind == EventKind.TICK_SKIPPED]


# -- declaring


async def test_a_new_schedule_begins_when_it_is_declared(bench: Bench) -> None:
    answer = await declare(bench, declared(trigger="0 2 * * *", timezone="Asia/Kolkata", overlap=False, misfire="all"))
    assert answer.marks["job"].last_tick == START
    found = await state(bench)
    assert (found.trigger, found.timezone, found.overlap, found.misfire) == ("0 2 * * *", "Asia/Kolkata", False, "all")
    assert (found.last_tick, found.next_tick, found.last_run, found.last_status) == (START, START + MINUTE, None, None)


async def test_a_schedule_that_is_declared_again_goes_on_where_it_was(bench: Bench) -> None:
    await declare(bench)
    await fire(bench, firing(START, START + MINUTE))
    bench.pass_time(3_600)
    answer = await declare(bench, declared(overlap=False, misfire="skip"))
    assert answer.marks["job"].last_tick == START + MINUTE
    found = await state(bench)
    assert (found.overlap, found.misfire, found.last_tick) == (False, "skip", START + MINUTE)


@pytest.mark.parametrize("change", [{"trigger": "every 5 s"}, {"timezone": "Europe/London"}])
async def test_a_schedule_whose_times_changed_begins_now(bench: Bench, change: dict[str, str]) -> None:
    await declare(bench)
    bench.pass_time(3_600)
    assert (await declare(bench, declared(**change))).marks["job"].last_tick == bench.now


async def test_schedules_of_other_code_stay_as_they_are(bench: Bench) -> None:
    await declare(bench, declared("old"))
    await declare(bench, declared("new"))
    assert [found.name for found in await bench.backend.schedules()] == ["new", "old"]


# -- firing


async def test_a_due_tick_becomes_a_task_of_its_schedule(bench: Bench) -> None:
    await declare(bench)
    bench.pass_time(60)
    answer = await fire(bench, firing(START, START + MINUTE))
    assert (answer.changed, answer.marks["job"].last_tick) == (1, START + MINUTE)
    task = await bench.get("job@00:01")
    assert (task.schedule, task.source, task.status, task.run_at) == ("job", "scheduled", "pending", START + MINUTE)
    found = await state(bench)
    assert (found.last_tick, found.next_tick) == (START + MINUTE, START + 2 * MINUTE)
    assert (found.last_run, found.last_task_id, found.last_status) == (START + MINUTE, task.task_id, "pending")


async def test_the_turn_that_fires_a_tick_can_start_it(bench: Bench) -> None:
    await declare(bench)
    bench.pass_time(60)
    result: TurnResult = await bench.turn(
        commands=[Fire([firing(START, START + MINUTE)])], demand=Demand({"job": "thread"}, {"thread": 1})
    )
    assert [task.task_id for task in result.claimed] == ["job@00:01"]


async def test_a_tick_that_another_instance_has_fired_is_not_fired_again(backend: Backend) -> None:
    one, two = Bench(backend, "one"), Bench(backend, "two")
    await declare(one)
    await declare(two)
    assert (await fire(one, firing(START, START + MINUTE))).changed == 1
    answer = await fire(two, firing(START, START + MINUTE))
    assert (answer.changed, answer.marks["job"].last_tick) == (0, START + MINUTE)
    assert await runs(one) == [START + MINUTE]
    assert await one.kinds("job@00:01") == ["accepted"]


async def test_what_was_computed_from_an_older_tick_is_not_written(bench: Bench) -> None:
    """Its misfires may be no misfires: another instance has fired some of them."""
    await declare(bench)
    await fire(bench, firing(START, START + MINUTE))
    answer = await fire(bench, firing(START, START + 5 * MINUTE, missed="4 ticks were missed"))
    assert answer.marks["job"].last_tick == START + MINUTE
    assert await runs(bench) == [START + MINUTE]
    assert await skips(bench) == []


async def test_a_clock_that_went_back_doubles_no_tick(bench: Bench) -> None:
    """Then the schedule's last tick lies ahead, and it is the tick's id that says it was fired."""
    await declare(bench)
    await fire(bench, firing(START, START + MINUTE, START + 2 * MINUTE))
    await fire(bench, firing(START + 2 * MINUTE, START + MINUTE))
    assert (await state(bench)).last_tick == START + MINUTE
    assert await runs(bench) == [START + MINUTE, START + 2 * MINUTE]
    assert await bench.kinds("job@00:01") == ["accepted"]


async def test_a_schedule_that_is_not_stored_is_missing_from_the_answer(bench: Bench) -> None:
    await declare(bench)
    answer = await fire(bench, firing(START, START + MINUTE), firing(START, START + MINUTE, name="gone"))
    assert answer.marks.keys() == {"job"}
    assert await runs(bench, "gone") == []


async def test_missed_ticks_are_recorded_with_the_schedule_and_not_as_tasks(bench: Bench) -> None:
    await declare(bench)
    await fire(bench, firing(START, START + 9 * MINUTE, missed="8 ticks were missed"))
    await fire(bench, firing(START + 9 * MINUTE, drafts=[], until=START + 20 * MINUTE, missed="11 ticks were missed"))
    assert await skips(bench) == ["8 ticks were missed", "11 ticks were missed"]
    found = await state(bench)
    assert (found.last_tick, found.last_run) == (START + 20 * MINUTE, START + 9 * MINUTE)


async def test_ticks_of_a_thousand_schedules_are_one_command(bench: Bench) -> None:
    names = [f"job-{number}" for number in range(1_000)]
    await declare(bench, *map(declared, names))
    bench.pass_time(60)
    answer = await fire(bench, *(firing(START, START + MINUTE, name=name) for name in names))
    assert answer.changed == 1_000
    assert {found.last_tick for found in await bench.backend.schedules()} == {START + MINUTE}
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_a_full_queue_keeps_the_tick_as_rejected_and_the_schedule_goes_on(bench: Bench) -> None:
    await bench.obey(DeclareQueues({"default": QueueConfig(max_size=1)}))
    await bench.add()
    await declare(bench)
    await fire(bench, firing(START, START))
    assert await bench.status("job@00:00") is TaskStatus.REJECTED
    assert (await state(bench)).last_status is TaskStatus.REJECTED


# -- overlap


@pytest.mark.parametrize("status", [TaskStatus.PENDING, TaskStatus.RUNNING])
async def test_without_overlap_a_tick_is_skipped_while_one_of_its_tasks_waits_or_runs(
    bench: Bench, status: TaskStatus
) -> None:
    await declare(bench)
    bench.pass_time(120)
    await fire(bench, firing(START, START + MINUTE, overlap=False))
    if status is TaskStatus.RUNNING:
        task = await bench.claim_one()
    answer = await fire(bench, firing(START + MINUTE, START + 2 * MINUTE, overlap=False))
    assert answer.marks["job"].last_tick == START + 2 * MINUTE
    assert await runs(bench) == [START + MINUTE]
    (words,) = await skips(bench)
    assert words.startswith("2026-01-01T00:02:00+00:00: one of its tasks still waits or runs")
    if status is TaskStatus.RUNNING:
        await bench.finish(task)
        await fire(bench, firing(START + 2 * MINUTE, START + 3 * MINUTE, overlap=False))
        assert await runs(bench) == [START + MINUTE, START + 3 * MINUTE]


async def test_without_overlap_a_retry_that_waits_counts(bench: Bench) -> None:
    await declare(bench)
    bench.pass_time(120)
    await fire(bench, firing(START, START + MINUTE, overlap=False))
    await bench.finish(await bench.claim_one(), TaskStatus.PENDING, run_at=bench.now + 9 * MINUTE)
    await fire(bench, firing(START + MINUTE, START + 2 * MINUTE, overlap=False))
    assert await runs(bench) == [bench.now + 9 * MINUTE]


async def test_without_overlap_one_of_several_ticks_is_fired(bench: Bench) -> None:
    await declare(bench)
    await fire(bench, firing(START, START + MINUTE, START + 2 * MINUTE, overlap=False))
    assert await runs(bench) == [START + MINUTE]
    assert len(await skips(bench)) == 1


async def test_another_schedule_of_the_same_name_s_beginning_is_another(bench: Bench) -> None:
    await declare(bench, declared("job"), declared("job2"))
    await fire(bench, firing(START, START + MINUTE, overlap=False))
    await fire(bench, firing(START, START + MINUTE, name="job2", overlap=False))
    assert await runs(bench, "job2") == [START + MINUTE]


# -- at startup


def starting(bench: Bench, task_id: str, **facts: Any) -> DeclaredSchedule:
    at_startup = make_draft(task_id=task_id, at=bench.now)._replace(schedule="job")
    return declared(at_startup=at_startup, startup_window=MINUTE, **facts)


async def test_instances_that_start_within_the_window_run_it_once(bench: Bench) -> None:
    await declare(bench, starting(bench, "first"))
    bench.pass_time(59)
    await declare(bench, starting(bench, "second"))
    assert [task.task_id for task in await all_tasks(bench.backend)] == ["first"]
    assert (await state(bench)).last_run == START
    bench.pass_time(1)
    await declare(bench, starting(bench, "third"))
    assert {task.task_id for task in await all_tasks(bench.backend)} == {"first", "third"}


async def test_a_run_at_startup_leaves_the_ticks_alone(bench: Bench) -> None:
    await declare(bench)
    await fire(bench, firing(START, START + MINUTE))
    bench.pass_time(90)
    await declare(bench, starting(bench, "first"))
    assert (await state(bench)).last_tick == START + MINUTE


async def test_a_paused_schedule_does_not_run_at_startup(bench: Bench) -> None:
    await declare(bench)
    await bench.obey(EditSchedule("job", EventKind.PAUSE_SCHEDULE, True, None, "ann"))
    await declare(bench, starting(bench, "first"))
    assert await all_tasks(bench.backend) == []


async def test_without_overlap_a_run_at_startup_is_skipped_while_one_of_its_tasks_runs(bench: Bench) -> None:
    await declare(bench)
    await fire(bench, firing(START, START))
    await declare(bench, starting(bench, "first", overlap=False))
    assert [task.task_id for task in await all_tasks(bench.backend)] == ["job@00:00"]
    assert len(await skips(bench)) == 1


# -- operators


async def test_a_paused_schedule_fires_nothing_and_says_so(bench: Bench) -> None:
    await declare(bench)
    await bench.obey(EditSchedule("job", EventKind.PAUSE_SCHEDULE, True, "deploy", "ann"))
    answer = await fire(bench, firing(START, START + MINUTE))
    assert (answer.changed, answer.marks["job"].paused, answer.marks["job"].last_tick) == (0, True, START)
    assert await runs(bench) == []
    found = await state(bench)
    assert (found.paused, found.reason) == (True, "deploy")
    assert [(event.kind, event.actor) for event in await bench.backend.audit(None, 5)] == [("pause_schedule", "ann")]


async def test_a_pause_survives_a_new_declaration(bench: Bench) -> None:
    await declare(bench)
    await bench.obey(EditSchedule("job", EventKind.PAUSE_SCHEDULE, True, "deploy", "ann"))
    assert (await declare(bench, declared(trigger="every 5 s"))).marks["job"].paused
    assert (await state(bench)).reason == "deploy"


async def test_a_resumed_schedule_begins_now_and_one_that_was_not_paused_goes_on(bench: Bench) -> None:
    await declare(bench)
    resume = EditSchedule("job", EventKind.RESUME_SCHEDULE, False, None, "ann", START + 9 * MINUTE)
    bench.pass_time(300)
    await bench.obey(resume)
    assert (await state(bench)).last_tick == START
    await bench.obey(EditSchedule("job", EventKind.PAUSE_SCHEDULE, True, None, "ann"))
    bench.pass_time(60)
    await bench.obey(resume)
    found = await state(bench)
    assert (found.last_tick, found.next_tick, found.paused, found.reason) == (
        bench.now,
        START + 9 * MINUTE,
        False,
        None,
    )


async def test_an_edit_of_an_unknown_schedule_changes_nothing(bench: Bench) -> None:
    assert (await bench.obey(EditSchedule("nobody", EventKind.PAUSE_SCHEDULE, True, None, "ann"))).changed == 0
    assert await bench.backend.audit(None, 5) == []


async def test_a_run_by_hand_is_a_run_of_the_schedule_and_no_tick(bench: Bench) -> None:
    await declare(bench)
    bench.pass_time(30)
    draft = make_draft(task_id="by-hand", at=bench.now, source="scheduled")._replace(schedule="job")
    await bench.turn(commands=[RunSchedule("job", "by-hand", "ann")], drafts=[draft])
    found = await state(bench)
    assert (found.last_run, found.last_task_id, found.last_tick) == (bench.now, "by-hand", START)
    assert await runs(bench) == [bench.now]
    (event,) = await bench.backend.audit(None, 5)
    assert (event.kind, event.actor, event.task_id) == ("run_schedule", "ann", "by-hand")


# -- one-offs


def one_off(run_key: str, run_at: datetime, **facts: Any) -> Draft:
    return make_draft(run_at=run_at, source="scheduled", **facts)._replace(run_key=run_key)


async def schedule_once(bench: Bench, draft: Draft) -> Answer:
    (answer,) = (await bench.turn(commands=[Supersede(draft)], drafts=[draft])).answers
    return answer


async def waiting(bench: Bench, **options: Any) -> list[ScheduledOnce]:
    return list(await bench.backend.scheduled(options.get("before"), options.get("after"), options.get("limit", 100)))


async def test_one_offs_that_wait_are_listed_soonest_first(bench: Bench) -> None:
    for number in (3, 1, 2):
        draft = one_off(f"key-{number}", START + number * MINUTE, priority=number, tags={"n": str(number)})
        await schedule_once(bench, draft)
    found = await waiting(bench)
    assert [(item.run_key, item.fire_at, item.priority) for item in found] == [
        (f"key-{number}", START + number * MINUTE, number) for number in (1, 2, 3)
    ]
    assert (found[0].func_name, found[0].queue, found[0].tags, found[0].created_at) == (
        "job",
        "default",
        {"n": "1"},
        START,
    )
    assert [item.run_key for item in await waiting(bench, before=START + 2 * MINUTE)] == ["key-1"]
    assert [item.run_key for item in await waiting(bench, limit=2)] == ["key-1", "key-2"]
    place = (found[0].fire_at, found[0].task_id)
    assert [item.run_key for item in await waiting(bench, after=place)] == ["key-2", "key-3"]


async def test_a_one_off_takes_the_place_of_what_waits_under_its_key(bench: Bench) -> None:
    old, new = one_off("key", START + MINUTE), one_off("key", START + 2 * MINUTE)
    await schedule_once(bench, old)
    assert (await schedule_once(bench, new)).changed == 1
    assert [item.task_id for item in await waiting(bench)] == [new.task_id]
    record = await bench.get(old.task_id)
    assert (record.status, record.error) == ("cancelled", f"replaced by {new.task_id}")
    bench.pass_time(60)
    assert await bench.claim() == []
    bench.pass_time(60)
    assert [task.task_id for task in await bench.claim()] == [new.task_id]
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_what_runs_or_has_ended_is_not_replaced(bench: Bench) -> None:
    first = one_off("key", START)
    await schedule_once(bench, first)
    task = await bench.claim_one()
    assert (await schedule_once(bench, one_off("key", START + MINUTE))).changed == 0
    await bench.finish(task)
    assert (await schedule_once(bench, one_off("key", START + 2 * MINUTE))).changed == 1
    assert await bench.status(first.task_id) is TaskStatus.SUCCESS


async def test_a_retry_of_an_earlier_time_is_replaced_too(bench: Bench) -> None:
    await schedule_once(bench, one_off("key", START, max_attempts=2))
    await bench.finish(await bench.claim_one(), TaskStatus.PENDING, run_at=START + 5 * MINUTE)
    assert (await schedule_once(bench, one_off("key", START + MINUTE))).changed == 1
    assert [item.fire_at for item in await waiting(bench)] == [START + MINUTE]


async def test_one_idempotency_key_is_one_task_that_is_moved(bench: Bench) -> None:
    first = one_off("key", START + MINUTE, task_id="same", key="order-7", arguments="[[1],{}]")
    await schedule_once(bench, first)
    moved = first._replace(run_at=START + 3 * MINUTE, arguments="[[2],{}]", queue="mail", priority=4)
    await schedule_once(bench, moved)
    (found,) = await waiting(bench)
    assert (found.task_id, found.fire_at, found.queue, found.priority) == ("same", START + 3 * MINUTE, "mail", 4)
    assert (await bench.get("same")).arguments == "[[2],{}]"
    assert await bench.kinds("same") == ["accepted", "moved"]
    await schedule_once(bench, first._replace(run_at=START))
    assert [task.task_id for task in await bench.claim()] == ["same"]
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_cancelling_a_key_cancels_what_waits_under_it_and_says_who_did_it(bench: Bench) -> None:
    draft, other = one_off("a/b", START + MINUTE), one_off("a", START + MINUTE)
    await schedule_once(bench, draft)
    await schedule_once(bench, other)
    assert (await bench.obey(CancelScheduled("a/b", "ann"))).changed == 1
    assert (await bench.obey(CancelScheduled("a/b", "ann"))).changed == 0
    assert await bench.status(draft.task_id) is TaskStatus.CANCELLED
    assert [item.run_key for item in await waiting(bench)] == ["a"]
    (event,) = await bench.backend.audit(None, 5)
    assert (event.kind, event.actor, event.task_id) == ("cancel_scheduled", "ann", draft.task_id)


@pytest.mark.parametrize("seconds", [0, 60])
async def test_of_two_instances_that_move_a_deadline_at_once_one_deadline_is_left(
    shared_location: str, seconds: int
) -> None:
    backends = [open_backend(shared_location) for _ in range(2)]
    for backend in backends:
        await backend.open()
    benches = [Bench(backend, f"instance-{number}") for number, backend in enumerate(backends)]
    when = START + timedelta(hours=1)
    for round_number in range(10):
        await asyncio.gather(
            *(
                schedule_once(bench, one_off("key", when + round_number * timedelta(seconds=seconds)))
                for bench in benches
            )
        )
        assert len(await waiting(benches[0])) == 1
    for backend in backends:
        await backend.close()


# -- what was skipped is forgotten, in its time


async def test_old_skips_are_pruned_and_new_ones_kept(bench: Bench) -> None:
    await declare(bench)
    await fire(bench, firing(START, START + MINUTE, missed="old"))
    bench.pass_time(3_600)
    await fire(bench, firing(START + MINUTE, START + 60 * MINUTE, missed="new"))
    await bench.obey(Purge(START + MINUTE, 10))
    assert await skips(bench) == ["new"]


# -- an older database


async def test_a_database_of_the_second_schema_gets_what_schedules_need(tmp_path: Path) -> None:
    file = tmp_path / "tasks.db"
    backend = open_backend(str(file))
    await backend.open()
    await backend.close()
    with closing(sqlite3.connect(file)) as connection:
        indexes = ("runs", "live_runs", "run_key", "one_offs", "skips")
        connection.executescript(
            "".join(f"DROP INDEX taskflow_{name};" for name in indexes)
            + "ALTER TABLE taskflow_task DROP COLUMN schedule; ALTER TABLE taskflow_task DROP COLUMN run_key;"
            + "DROP TABLE taskflow_schedule; UPDATE taskflow_schema_version SET version = 2"
        )
    for _ in range(2):  # a step may run twice: two instances start at once, or one dies in the middle
        await backend.open()
        bench = Bench(backend)
        await declare(bench)
        await schedule_once(bench, one_off("key", START + MINUTE))
        assert len(await waiting(bench)) == 1
        await backend.close()
        with closing(sqlite3.connect(file)) as connection, connection:
            versions = [row[0] for row in connection.execute("SELECT version FROM taskflow_schema_version ORDER BY 1")]
            assert versions[-1] == SCHEMA_VERSION
            connection.execute("DELETE FROM taskflow_schema_version WHERE version > 2")
            found = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
            assert {f"taskflow_{name}" for name in indexes} <= found
