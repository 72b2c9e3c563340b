"""Schedules that never miss and never double: a year on a frozen clock, restarts, outages, clocks that jump, several
instances, and the loop that survives all of it."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from cryptography.fernet import Fernet

from app.taskflow import (
    BackendUnavailable,
    QueueConfig,
    QueueFullError,
    TaskArgumentError,
    TaskflowError,
    TaskManager,
    TaskStatus,
    get_task_context,
)
from app.taskflow.backends.base import Turn, TurnResult
from app.taskflow.errors import BadSchedule, ScheduleNotFound, UnknownFunction
from app.taskflow.models import TaskConfig, TaskFilter, TaskOptions, TaskRecord, schedule_subject
from app.taskflow.testing import advance, drain, next_ticks
from app.taskflow.ticks import Every

from .conftest import StartManager
from .helpers import all_tasks, assert_counters_match_rows, eventually

pytestmark = pytest.mark.anyio

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = 3_600.0
Define = Callable[[TaskManager], object]


def every(seconds: float, name: str = "job", **options: Any) -> Define:
    """A manager with one schedule that does nothing."""

    def define(manager: TaskManager) -> None:
        @manager.schedule(every=seconds, name=name, **options)
        async def job() -> None: ...

    return define


def frozen(*defines: Define, at: datetime = NOON) -> Define:
    def define(manager: TaskManager) -> None:
        manager.clock.freeze(at)
        for other in defines:
            other(manager)

    return define


async def runs(manager: TaskManager, name: str = "job") -> list[TaskRecord]:
    """Its tasks, by their tick."""
    found = await all_tasks(manager.backend, TaskFilter(schedule=name), 500)
    return sorted(found, key=lambda task: task.run_at)


async def ticks(manager: TaskManager, name: str = "job") -> list[datetime]:
    return [task.run_at for task in await runs(manager, name)]


async def minutes(manager: TaskManager, name: str = "job") -> list[str]:
    return [f"{tick:%H:%M}" for tick in await ticks(manager, name)]


async def skips(manager: TaskManager, name: str = "job") -> list[str]:
    return [event.detail or "" for event in await manager.backend.events(schedule_subject(name))]


async def leap(manager: TaskManager, seconds: float) -> None:
    """The clock jumps, as over a downtime or in a blocked loop."""
    manager.clock.advance(seconds)
    await drain(manager)


@contextmanager
def outage(*managers: TaskManager) -> Iterator[None]:
    """While it lasts, nothing can be written."""

    async def refuse(_turn: Turn) -> TurnResult:
        raise BackendUnavailable("the disk is gone")

    for manager in managers:
        manager.backend.turn = refuse  # type: ignore[method-assign, assignment]
    yield
    for manager in managers:
        del manager.backend.turn


# -- every tick once


async def test_in_a_year_every_tick_of_every_kind_comes_exactly_once(start_manager: StartManager) -> None:
    """Day by day through the engine; that the ticks are the right ones is shown in test_ticks.py."""
    crons = {
        "london": ("30 1 * * *", "Europe/London"),
        "new-york": ("30 2 * * *", "America/New_York"),
        "lord-howe": ("15 2 * * 1-5", "Australia/Lord_Howe"),
        "havana": ("0 0 L * *", "America/Havana"),
        "kolkata": ("0 */6 * * *", "Asia/Kolkata"),
        "hourly": ("0 * * * *", "Europe/London"),
    }

    def define(manager: TaskManager) -> None:
        async def job() -> None: ...

        for name, (cron, zone) in crons.items():
            manager.schedule(cron=cron, timezone=zone, name=name, misfire="all")(job)
        manager.schedule(every=timedelta(hours=7), name="interval", misfire="all")(job)

    start = datetime(2026, 1, 1, tzinfo=UTC)
    manager = await start_manager(frozen(define, at=start))
    for _ in range(365):
        await leap(manager, 86_400)
    for schedule in manager.schedules:
        expected = [schedule.trigger.next_tick(start)]
        while (tick := schedule.trigger.next_tick(expected[-1])) <= manager.clock():
            expected.append(tick)
        assert await ticks(manager, schedule.name) == expected, schedule.name
    assert {task.status for task in await runs(manager, "hourly")} == {TaskStatus.SUCCESS}


async def test_two_instances_on_one_database_fire_every_tick_once(start_manager: StartManager) -> None:
    def define(manager: TaskManager) -> None:
        every(1)(manager)
        manager.schedule(cron="* * * * * */2", name="cron", timezone="Europe/London")(
            manager.registry.named("job").function
        )

    one, two = [await start_manager(frozen(define)) for _ in range(2)]
    for _ in range(60):
        for manager in (one, two):
            manager.clock.advance(1)
            manager.scheduler.wake()
        await asyncio.gather(drain(one), drain(two))
    assert await ticks(one) == [NOON + timedelta(seconds=second) for second in range(1, 61)]
    assert await ticks(two, "cron") == [NOON + timedelta(seconds=second) for second in range(2, 61, 2)]
    starts = Counter(event.kind for event in await one.backend.events_after(0, 10_000))
    assert starts["accepted"] == starts["started"] == starts["succeeded"] == 90


async def test_in_real_time_two_busy_instances_miss_no_second(start_manager: StartManager) -> None:
    """The template's `python -m benchmarks.ticks` shows the same for minutes."""

    def define(manager: TaskManager) -> None:
        every(0.5, misfire="all")(manager)  # a machine that stalls for a second is no failure of ours

        @manager.task
        async def load() -> None: ...

    one, two = [await start_manager(define) for _ in range(2)]
    load = one.registry.named("load").function
    began = datetime.now(UTC)
    while datetime.now(UTC) < began + timedelta(seconds=3):
        await asyncio.gather(*(one.enqueue(load) for _ in range(20)))
    ended = datetime.now(UTC)
    await eventually(lambda: one.scheduler.next_look and one.scheduler.next_look > ended)
    found = [tick for tick in await ticks(one) if began < tick <= ended]
    trigger = Every.of(0.5)
    assert found == list(trigger.ticks(began, ended, 100).newest)
    assert len(found) >= 5
    await two.shutdown()


async def test_a_task_says_which_tick_it_is_for_and_when_it_was_fired(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(60)))
    await leap(manager, 60.5)
    (task,) = await runs(manager)
    assert (task.run_at, task.created_at) == (NOON + timedelta(seconds=60), NOON + timedelta(seconds=60.5))
    assert (task.source, task.schedule, task.func_name) == ("scheduled", "job", "job")


async def test_a_schedule_is_a_task_with_all_its_options_and_arguments(start_manager: StartManager) -> None:
    seen: list[Any] = []

    def define(manager: TaskManager) -> None:
        @manager.schedule(
            every=60,
            args=(datetime(2026, 1, 1, tzinfo=UTC),),
            kwargs={"names": {"a", "b"}},
            name="report",
            retries=2,
            queue="slow",
            priority=7,
            tags={"team": "data"},
            timeout=5,
        )
        def make_report(day: datetime, *, names: set[str]) -> None:
            context = get_task_context()
            assert context is not None
            seen.append((day, names))
            if context.attempt == 0:
                raise ConnectionError("not yet")

    manager = await start_manager(
        frozen(define), queues={"slow": QueueConfig()}, encrypt_args_key=Fernet.generate_key()
    )
    await advance(manager, 60)
    (task,) = await runs(manager, "report")
    assert (task.status, task.attempt, task.max_attempts) == ("success", 2, 3)
    assert (task.queue, task.priority, task.tags) == ("slow", 7, {"team": "data"})
    assert seen == [(datetime(2026, 1, 1, tzinfo=UTC), {"a", "b"})] * 2
    assert ((await manager.store.get(task.task_id)).arguments or "").startswith("sealed:")


async def test_a_scheduled_function_can_be_added_by_hand_too(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(60)))
    task_id = await manager.enqueue(manager.registry.named("job").function)
    await drain(manager)
    task = await manager.store.get(task_id)
    assert (task.status, task.source, task.schedule) == ("success", "manual", None)


# -- what is refused, and what a decorator keeps


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, BadSchedule),
        ({"every": 1, "cron": "* * * * *"}, ValueError),
        ({"every": 0}, TaskflowError),
        ({"cron": "0 0 30 2 *"}, ValueError),
        ({"every": 5, "timezone": "Nowhere"}, ValueError),
        ({"every": 5, "misfire": "twice"}, BadSchedule),
        ({"every": 5, "args": "text"}, BadSchedule),
        ({"every": 5, "retries": -1}, ValueError),
        ({"every": 5, "retrys": 1}, TypeError),
        ({"every": 5, "args": ("five",)}, TaskArgumentError),
        ({"every": 5, "kwargs": {"other": 1}}, TaskArgumentError),
        ({"every": 5, "args": (object(),)}, TaskArgumentError),
        ({"every": 5}, TaskArgumentError),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(options: dict[str, Any], error: type[Exception]) -> None:
    def job(number: int) -> None: ...

    with pytest.raises(error):
        TaskManager().schedule(**options)(job)


def test_two_schedules_of_one_name_are_refused() -> None:
    manager = TaskManager()

    @manager.schedule(every=5)
    def job() -> None: ...

    with pytest.raises(TaskflowError, match=r"two schedules are named 'job'.*schedule\(name="):
        manager.schedule(cron="0 0 * * *")(job)
    manager.schedule(cron="0 0 * * *", name="nightly")(job)
    assert [schedule.name for schedule in manager.schedules] == ["job", "nightly"]
    assert manager.registry.of(job).name == "job"


def test_a_schedule_over_a_task_keeps_its_settings_unless_it_has_its_own() -> None:
    manager = TaskManager()

    @manager.schedule(every=5)
    @manager.task(retries=3, queue="mail")
    def kept() -> None: ...

    @manager.schedule(every=5, retries=1)
    @manager.task(retries=3)
    def changed() -> None: ...

    @manager.task(retries=4)
    @manager.schedule(every=5)
    def above() -> None: ...

    @manager.schedule(every=5, name="second")
    @manager.task(retries=2)
    def named() -> None: ...

    configs = {name: manager.registry.named(name).config for name in ("kept", "changed", "above", "named", "second")}
    assert {name: config.retries for name, config in configs.items()} == {
        "kept": 3, "changed": 1, "above": 4, "named": 2, "second": 2,
    }  # fmt: skip
    assert configs["kept"].queue == "mail"
    assert manager.registry.of(changed).config.retries == 1


def test_a_schedule_takes_every_option_of_a_task() -> None:
    assert set(TaskOptions.__annotations__) == {option.name for option in fields(TaskConfig)}
    given = signature(TaskManager.task).parameters.keys() - {"self", "function"}
    assert given == set(TaskOptions.__annotations__)


# -- misfires


@pytest.mark.parametrize(
    ("misfire", "made_up"),
    [("skip", []), ("once", ["17:00"]), ("all", ["13:00", "14:00", "15:00", "16:00", "17:00"])],
)
@pytest.mark.parametrize("how", ["restart", "leap", "outage"])
@pytest.mark.usefixtures("quick_refusals")
async def test_ticks_that_were_missed_are_made_up_for_as_the_schedule_says(
    start_manager: StartManager, misfire: str, made_up: list[str], how: str
) -> None:
    define = frozen(every(HOUR, misfire=misfire))
    manager = await start_manager(define)
    await asyncio.wait_for(manager.scheduler.declared.wait(), 10)  # a start waits but briefly here
    if how == "restart":
        await manager.shutdown()
        manager = await start_manager(frozen(every(HOUR, misfire=misfire), at=NOON + timedelta(hours=5.5)))
    elif how == "outage":
        with outage(manager):
            manager.clock.advance(5.5 * HOUR)
            manager.scheduler.wake()
            await eventually(lambda: manager.journal.last_error)
            await asyncio.sleep(0)
    else:
        manager.clock.advance(5.5 * HOUR)
    await drain(manager)
    assert await minutes(manager) == made_up
    missed = 5 - len(made_up)
    assert [words.split(" ")[0] for words in await skips(manager)] == ([str(missed)] if missed else [])
    await advance(manager, HOUR)
    assert await minutes(manager) == [*made_up, "18:00"]


async def test_of_endless_missed_ticks_the_newest_hundred_are_made_up_for(
    start_manager: StartManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = await start_manager(frozen(every(1, misfire="all")))
    with caplog.at_level(logging.WARNING, "taskflow"):
        await leap(manager, 86_400)
    found = await ticks(manager)
    assert (len(found), found[-1]) == (100, NOON + timedelta(days=1))
    assert "86300 ticks" in (await skips(manager))[0]
    assert any("86300 ticks" in record.getMessage() for record in caplog.records)


async def test_an_outage_loses_no_tick_that_is_on_time_when_it_ends(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(60)))
    with outage(manager):
        manager.clock.advance(60.5)
        manager.scheduler.wake()
        await eventually(lambda: manager.journal.last_error)
        assert manager.scheduler.behind
    await drain(manager)
    assert await minutes(manager) == ["12:01"]


@pytest.mark.usefixtures("quick_refusals")
async def test_a_database_that_is_away_at_the_start_delays_the_schedules(start_manager: StartManager) -> None:
    def away(manager: TaskManager) -> None:
        async def refuse() -> None:
            raise BackendUnavailable("not there yet")

        manager.backend.open = refuse  # type: ignore[method-assign]

    manager = await start_manager(frozen(every(60), away))
    assert not manager.scheduler.declared.is_set()
    del manager.backend.open
    await asyncio.wait_for(manager.scheduler.declared.wait(), 10)
    await advance(manager, 60)
    assert await minutes(manager) == ["12:01"]


# -- overlap


@pytest.mark.parametrize("overlap", [True, False])
async def test_a_tick_while_one_runs_is_fired_or_skipped_and_shown(start_manager: StartManager, overlap: bool) -> None:
    gate = asyncio.Event()

    def define(manager: TaskManager) -> None:
        @manager.schedule(every=60, overlap=overlap)
        async def job() -> None:
            await gate.wait()

    manager = await start_manager(frozen(define))
    for number in (1, 2):
        manager.clock.advance(60)
        manager.scheduler.wake()
        await eventually(partial(settled, manager, NOON + timedelta(minutes=number)))
    assert await minutes(manager) == (["12:01", "12:02"] if overlap else ["12:01"])
    assert len(await skips(manager)) == (0 if overlap else 1)
    gate.set()
    await drain(manager)
    await advance(manager, 60)
    assert (await minutes(manager))[-1] == "12:03"


async def settled(manager: TaskManager, tick: datetime) -> bool:
    return all(state.last_tick == tick for state in await manager.schedules.states())


# -- clocks that jump


async def test_a_clock_that_is_put_back_doubles_nothing_and_stops_nothing(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(60)))
    await advance(manager, 10 * 60)
    manager.clock.freeze(NOON + timedelta(minutes=2, seconds=30))
    await asyncio.sleep(0)
    manager.scheduler.wake()
    await advance(manager, 10 * 60)
    found = await ticks(manager)
    assert found == [NOON + timedelta(minutes=minute) for minute in range(1, 13)]
    assert {task.attempt for task in await runs(manager)} == {1}


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_clock_that_was_years_ahead_does_not_stop_a_schedule_for_years(
    start_manager: StartManager, restarted: bool
) -> None:
    manager = await start_manager(frozen(every(60)))
    await leap(manager, 5 * 366 * 86_400)
    if restarted:
        await manager.shutdown()
        manager = await start_manager(frozen(every(60)))
    else:
        manager.clock.freeze(NOON)
        manager.scheduler.wake()
        await eventually(lambda: manager.scheduler.next_look == NOON + timedelta(minutes=1))
    await advance(manager, 3 * 60)
    assert (await minutes(manager))[:3] == ["12:01", "12:02", "12:03"]


async def test_a_clock_that_goes_on_by_itself_is_seen_within_a_second(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(HOUR)))
    await manager.scheduler.declared.wait()
    manager.clock.advance(HOUR)  # nobody wakes the loop
    await eventually(lambda: ticks(manager))


# -- run_on_startup


async def test_instances_that_start_together_run_a_schedule_once_at_startup(start_manager: StartManager) -> None:
    define = every(60, run_on_startup=True)
    one = await start_manager(frozen(define))
    await start_manager(frozen(define, at=NOON + timedelta(seconds=30)))
    await drain(one)
    assert await ticks(one) == [NOON]
    await start_manager(frozen(define, at=NOON + timedelta(seconds=61)))
    await eventually(lambda: has_ticks(one, 2))


async def has_ticks(manager: TaskManager, n: int) -> bool:
    return len(await ticks(manager)) >= n


@pytest.mark.parametrize(("seconds", "n"), [(59, 1), (60, 2)])
async def test_a_cron_schedule_runs_once_for_all_that_start_within_a_minute(
    start_manager: StartManager, seconds: float, n: int
) -> None:
    def define(manager: TaskManager) -> None:
        @manager.schedule(cron="0 0 1 1 *", run_on_startup=True)
        async def job() -> None: ...

    one = await start_manager(frozen(define))
    await one.shutdown()
    two = await start_manager(frozen(define, at=NOON + timedelta(seconds=seconds)))
    await drain(two)
    assert len(await ticks(two)) == n


# -- operators, on any instance


async def test_a_pause_holds_on_every_instance_and_is_no_misfire(start_manager: StartManager) -> None:
    one, two = [await start_manager(frozen(every(60, misfire="all"))) for _ in range(2)]
    state = await one.schedules.pause("job", "ann", "deploy")
    assert (state.paused, state.reason, state.next_tick) == (True, "deploy", None)
    for manager in (one, two):
        await advance(manager, 5 * 60)
    assert await ticks(one) == []
    state = await two.schedules.resume("job", "ann")
    assert (state.paused, state.next_tick) == (False, NOON + timedelta(minutes=6))
    for manager in (one, two):
        await advance(manager, 60)
    assert await minutes(one) == ["12:06"]
    assert await skips(one) == []


async def test_a_pause_survives_a_restart(start_manager: StartManager) -> None:
    one = await start_manager(frozen(every(60)))
    await one.schedules.pause("job")
    await one.shutdown()
    two = await start_manager(frozen(every(60), at=NOON + timedelta(hours=1)))
    await advance(two, 300)
    assert await ticks(two) == []


async def test_a_schedule_is_run_now_whether_it_is_paused_or_not(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(60)))
    await manager.schedules.pause("job")
    manager.clock.advance(10)
    state = await manager.schedules.run("job", "ann")
    await drain(manager)
    (task,) = await runs(manager)
    assert (task.task_id, task.run_at, task.source) == (state.last_task_id, NOON + timedelta(seconds=10), "scheduled")
    assert (await manager.schedules.state("job")).last_status is TaskStatus.SUCCESS


@pytest.mark.parametrize("command", ["pause", "resume", "run"])
async def test_an_unknown_schedule_is_not_found(start_manager: StartManager, command: str) -> None:
    manager = await start_manager()
    with pytest.raises(ScheduleNotFound):
        await getattr(manager.schedules, command)("nobody")


async def test_the_last_and_the_next_run_are_shown(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(60)))
    state = await manager.schedules.state("job")
    assert (state.trigger, state.next_tick, state.last_run) == ("every 60 s", NOON + timedelta(minutes=1), None)
    await advance(manager, 90)
    state = await manager.schedules.state("job")
    assert (state.last_run, state.next_tick) == (NOON + timedelta(minutes=1), NOON + timedelta(minutes=2))
    assert state.last_status is TaskStatus.SUCCESS


# -- code that changes


async def test_a_schedule_that_left_the_code_is_history(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(60, "old")))
    await advance(manager, 60)
    await manager.shutdown()
    manager = await start_manager(frozen(every(60, "new"), at=NOON + timedelta(minutes=1)))
    await advance(manager, 300)
    old = await manager.schedules.state("old")
    assert (old.next_tick, old.last_run, old.last_status) == (None, NOON + timedelta(minutes=1), TaskStatus.SUCCESS)
    assert await minutes(manager, "old") == ["12:01"]
    assert len(await minutes(manager, "new")) == 5
    with pytest.raises(UnknownFunction):
        await manager.schedules.run("old")


async def test_a_new_interval_begins_when_it_is_deployed(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(HOUR, misfire="all")))
    await manager.shutdown()
    manager = await start_manager(frozen(every(60, misfire="all"), at=NOON + timedelta(minutes=30)))
    await advance(manager, 60)
    assert await minutes(manager) == ["12:31"]


async def test_a_schedule_that_is_declared_late_is_fired_too(start_manager: StartManager) -> None:
    manager = await start_manager(frozen())
    every(60)(manager)
    manager.scheduler.wake()
    await eventually(lambda: manager.schedules.states())
    await advance(manager, 60)
    assert await minutes(manager) == ["12:01"]


# -- the loop survives


async def test_a_schedule_that_cannot_be_fired_keeps_no_other_from_its_ticks(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Exception): ...

    def define(manager: TaskManager) -> None:
        every(60)(manager)
        every(60, "broken")(manager)
        every(61, "endless")(manager)

    manager = await start_manager(frozen(define))
    next_tick = Every.next_tick

    def break_another(trigger: Every, after: datetime) -> datetime:
        if trigger.micros == 61_000_000:
            raise Broken
        return next_tick(trigger, after)

    monkeypatch.setattr(Every, "next_tick", break_another)
    draft, broken = manager.schedules.draft, True

    def break_one(schedule: Any, tick: datetime | None = None) -> Any:
        if broken and schedule.name == "broken":
            raise Broken
        return draft(schedule, tick)

    manager.schedules.draft = break_one  # type: ignore[method-assign]
    await advance(manager, 180)
    assert await minutes(manager) == ["12:01", "12:02", "12:03"]
    assert await minutes(manager, "broken") == []
    broken = False
    await advance(manager, 180)
    assert (await minutes(manager, "broken"))[-1] == "12:06"


async def test_a_full_queue_an_error_and_a_bad_observer_stop_nothing(start_manager: StartManager) -> None:
    class Observer:
        async def on_lifecycle(self, event: object) -> None:
            raise RuntimeError("an observer fails")

    def define(manager: TaskManager) -> None:
        @manager.task(queue="full")
        async def wait() -> None:
            await asyncio.sleep(60)

        @manager.schedule(every=60, queue="full")
        async def job() -> None: ...

        @manager.schedule(every=60)
        async def failing() -> None:
            raise RuntimeError("it fails")

    queues = {"full": QueueConfig(concurrency=1, max_size=1)}
    manager = await start_manager(frozen(define), queues=queues, loggers=[Observer()], shutdown_timeout=0.1)
    for _ in range(2):
        await manager.enqueue(manager.registry.named("wait").function)
        await asyncio.sleep(0.05)
    for number in (1, 2, 3):
        manager.clock.advance(60)
        manager.scheduler.wake()
        await eventually(partial(settled, manager, NOON + timedelta(minutes=number)))
    assert [task.status for task in await runs(manager)] == ["rejected"] * 3
    await eventually(lambda: has_status(manager, "failing", TaskStatus.FAILED, 3))
    with pytest.raises(QueueFullError):
        await manager.schedules.run("job")


async def has_status(manager: TaskManager, name: str, status: TaskStatus, n: int) -> bool:
    return [task.status for task in await runs(manager, name)] == [status] * n


async def test_a_schedule_whose_row_is_gone_is_declared_again(start_manager: StartManager, tmp_path: Path) -> None:
    manager = await start_manager(frozen(every(60)))
    with closing(sqlite3.connect(tmp_path / "tasks.db")) as connection, connection:
        connection.execute("DELETE FROM taskflow_schedule")
    await advance(manager, 60)
    await eventually(lambda: manager.schedules.states())
    await advance(manager, 60)
    assert await minutes(manager) == ["12:02"]


async def test_a_tick_whose_commit_was_not_heard_of_is_fired_once(start_manager: StartManager) -> None:
    """The database took it and the answer was lost: the next try finds that it was fired."""
    manager = await start_manager(frozen(every(60)))
    turn = manager.backend.turn
    lost: list[Turn] = []

    async def lose_the_answer(asked: Turn) -> TurnResult:
        result = await turn(asked)
        if asked.commands and not lost:
            lost.append(asked)
            raise BackendUnavailable("connection reset")
        return result

    manager.backend.turn = lose_the_answer  # type: ignore[method-assign, assignment]
    await advance(manager, 60)
    assert lost
    await advance(manager, 60)
    assert await minutes(manager) == ["12:01", "12:02"]
    await assert_counters_match_rows(manager.backend, manager.clock())


async def test_a_process_that_only_accepts_shows_schedules_and_fires_none(start_manager: StartManager) -> None:
    def accept_only(manager: TaskManager) -> None:
        manager.runs_tasks = False

    manager = await start_manager(frozen(every(60, run_on_startup=True), accept_only))
    assert [state.name for state in await manager.schedules.states()] == ["job"]
    manager.clock.advance(300)
    manager.scheduler.wake()
    await asyncio.sleep(0.05)
    assert await ticks(manager) == []


async def test_nothing_is_fired_once_the_service_stops(start_manager: StartManager) -> None:
    gate = asyncio.Event()

    def define(manager: TaskManager) -> None:
        every(60)(manager)

        @manager.task
        async def slow() -> None:
            await gate.wait()

    manager = await start_manager(frozen(define))
    await manager.enqueue(manager.registry.named("slow").function)
    await eventually(lambda: manager.dispatcher.running)
    stopping = asyncio.create_task(manager.shutdown())
    await eventually(lambda: not manager.dispatcher.claiming)
    manager.clock.advance(60)
    manager.scheduler.wake()
    gate.set()
    await stopping
    manager.clock.freeze(NOON)  # a restart makes up for ticks, and this one asks what was fired before it
    await manager.startup()
    assert await ticks(manager) == []


# -- one-offs


def define_reminders(manager: TaskManager) -> None:
    @manager.task
    async def remind(who: str) -> str:
        return who


def remind(manager: TaskManager) -> Any:
    return manager.registry.named("remind").function


async def test_a_one_off_runs_at_its_time_with_its_arguments_and_not_before(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(define_reminders))
    run_at = NOON + timedelta(hours=1)
    task_id = await manager.schedule_once(
        remind(manager), "ann", run_at=run_at, run_key="order/7", tags={"a": "b"}, priority=3
    )
    (waiting,) = await manager.list_scheduled()
    assert (waiting.run_key, waiting.task_id, waiting.func_name) == ("order/7", task_id, "remind")
    assert (waiting.fire_at, waiting.priority, waiting.tags) == (run_at, 3, {"a": "b"})
    assert (waiting.args, waiting.kwargs) == (("ann",), {})
    await advance(manager, HOUR - 0.001)
    assert (await manager.store.get(task_id)).status is TaskStatus.PENDING
    await advance(manager, 0.001)
    task = await manager.store.get(task_id)
    assert (task.status, task.source, task.run_key) == ("success", "scheduled", "order/7")
    assert await manager.result(task_id) == "ann"
    assert await manager.list_scheduled() == []


@pytest.mark.parametrize(
    ("text", "zone", "fold", "instant"),
    [
        ("2026-07-01 09:00", "Europe/London", 0, "2026-07-01 08:00"),
        ("2026-10-25 01:30", "Europe/London", 0, "2026-10-25 00:30"),
        ("2026-10-25 01:30", "Europe/London", 1, "2026-10-25 01:30"),
        ("2026-03-29 01:30", "Europe/London", 0, "2026-03-29 01:30"),
        ("2026-07-01 09:00", "Asia/Kolkata", 0, "2026-07-01 03:30"),
        ("2026-07-01 09:00", "Pacific/Kiritimati", 0, "2026-06-30 19:00"),
    ],
)
async def test_a_time_in_any_zone_is_an_exact_instant(
    start_manager: StartManager, text: str, zone: str, fold: int, instant: str
) -> None:
    manager = await start_manager(frozen(define_reminders))
    run_at = datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold)
    await manager.schedule_once(remind(manager), "ann", run_at=run_at, run_key="key")
    (waiting,) = await manager.list_scheduled()
    assert waiting.fire_at == datetime.fromisoformat(instant).replace(tzinfo=UTC)


async def test_a_deadline_that_another_instance_moved_never_fires_at_the_old_time(start_manager: StartManager) -> None:
    one, two = [await start_manager(frozen(define_reminders)) for _ in range(2)]
    old = await one.schedule_once(remind(one), "ann", run_at=NOON + timedelta(hours=1), run_key="key")
    new = await two.schedule_once(remind(two), "ann", run_at=NOON + timedelta(hours=2), run_key="key")
    for manager in (one, two):
        await advance(manager, HOUR)
    assert [waiting.task_id for waiting in await one.list_scheduled()] == [new]
    for manager in (one, two):
        await advance(manager, HOUR)
    records = {task_id: await one.store.get(task_id) for task_id in (old, new)}
    assert (records[old].status, records[old].error) == ("cancelled", f"replaced by {new}")
    assert (records[new].status, records[new].attempt) == ("success", 1)


async def test_a_one_off_is_cancelled_from_any_instance(start_manager: StartManager) -> None:
    one, two = [await start_manager(frozen(define_reminders)) for _ in range(2)]
    task_id = await one.schedule_once(remind(one), "ann", run_at=NOON + timedelta(hours=1), run_key="key")
    assert await two.cancel_scheduled("key")
    assert not await one.cancel_scheduled("key")
    assert not await one.cancel_scheduled("\ud800")
    await advance(one, 2 * HOUR)
    assert (await one.store.get(task_id)).status is TaskStatus.CANCELLED


async def test_one_offs_survive_a_restart_whatever_becomes_of_other_tasks(start_manager: StartManager) -> None:
    one = await start_manager(frozen(define_reminders), requeue_pending=False)
    await one.schedule_once(remind(one), "ann", run_at=NOON + timedelta(hours=1), run_key="key")
    await one.enqueue(remind(one), "bob", run_at=NOON + timedelta(hours=1))
    await one.shutdown()
    two = await start_manager(frozen(define_reminders, at=NOON + timedelta(hours=3)), requeue_pending=False)
    await drain(two)
    statuses = Counter(task.status for task in await all_tasks(two.backend))
    assert statuses == {TaskStatus.SUCCESS: 1, TaskStatus.CANCELLED: 1}


async def test_a_time_that_has_passed_means_now(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(define_reminders))
    task_id = await manager.schedule_once(remind(manager), "ann", run_at=NOON - timedelta(days=1), run_key="key")
    await drain(manager)
    assert (await manager.store.get(task_id)).status is TaskStatus.SUCCESS


async def test_a_one_off_that_is_due_at_once_is_refused_by_a_full_queue(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(define_reminders), max_size=1)
    await manager.store.edit_queue("default", {"concurrency": 1})
    await manager.store.pause_queue("default")
    await manager.enqueue(remind(manager), "bob")
    with pytest.raises(QueueFullError):
        await manager.schedule_once(remind(manager), "ann", run_at=NOON, run_key="key")
    await manager.schedule_once(remind(manager), "ann", run_at=NOON + timedelta(hours=1), run_key="key")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"run_at": datetime(2026, 1, 1), "run_key": "key"}, "needs a time zone"),
        ({"run_at": None, "run_key": "key"}, "needs a time zone: a datetime"),
        ({"run_at": NOON, "run_key": ""}, "'run_key' = '': must have 1 to 512"),
        ({"run_at": NOON, "run_key": "x" * 513}, "1 to 512 characters"),
        ({"run_at": NOON, "run_key": "a\0b"}, "NUL"),
        ({"run_at": NOON, "run_key": 7.5}, "'run_key' = 7.5: must be a string, an int or a UUID"),
    ],
)
async def test_a_one_off_that_cannot_be_is_refused_with_the_reason(
    start_manager: StartManager, options: dict[str, Any], words: str
) -> None:
    manager = await start_manager(frozen(define_reminders))
    with pytest.raises(TaskflowError, match=words):
        await manager.schedule_once(remind(manager), "ann", **options)


async def test_thousands_of_one_offs_are_listed_completely(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(define_reminders))
    moment = NOON + timedelta(hours=1)
    await asyncio.gather(
        *(
            manager.schedule_once(remind(manager), "ann", run_at=moment + timedelta(seconds=n % 7), run_key=f"key-{n}")
            for n in range(1_200)
        )
    )
    found = await manager.list_scheduled()
    assert len({item.run_key for item in found}) == len(found) == 1_200
    assert [item.fire_at for item in found] == sorted(item.fire_at for item in found)
    assert len(await manager.list_scheduled(before=moment + timedelta(seconds=1))) == 172
    with pytest.raises(TaskflowError, match="needs a time zone"):
        await manager.list_scheduled(before=datetime(2026, 1, 1))


# -- what a team tests its schedules with


async def test_time_that_passes_fires_each_tick_and_time_that_leaps_is_a_misfire(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(60)))
    await advance(manager, 300)
    assert await minutes(manager) == ["12:01", "12:02", "12:03", "12:04", "12:05"]
    await leap(manager, 300)
    assert (await minutes(manager))[5:] == ["12:10"]
    manager.clock.resume()
    with pytest.raises(ValueError, match="frozen"):
        await advance(manager, 1)


async def test_the_next_ticks_of_a_schedule_are_asked_for_by_its_name(start_manager: StartManager) -> None:
    manager = await start_manager(frozen(every(60)))
    assert next_ticks(manager, "job", 2) == [NOON + timedelta(minutes=1), NOON + timedelta(minutes=2)]
    with pytest.raises(ScheduleNotFound):
        next_ticks(manager, "nobody")
