"""What has ended is deleted in batches, with its history; what failed is retried in numbers; what waits is kept."""

import asyncio
import json
import sqlite3
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from app.taskflow import QueueConfig, QueueFullError, TaskManager, TaskRecord, TaskStatus, get_task_context, task_log
from app.taskflow.backends.base import Answer, Backend, Cancel, LogLine, Purge, Turn, TurnResult
from app.taskflow.models import TaskFilter
from app.taskflow.testing import drain

from .conftest import StartManager
from .helpers import PATIENCE, Bench, all_tasks, assert_counters_match_rows, eventually

pytestmark = pytest.mark.anyio

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = 86_400.0


def define(manager: TaskManager) -> None:
    @manager.task
    async def work(word: str = "") -> str:
        task_log(f"working on {word}")
        return word

    @manager.task
    async def fail(text: str = "no") -> None:
        context = get_task_context()
        assert context is not None
        if context.attempt == 0:
            raise ValueError(text)

    @manager.task
    async def fail_too() -> None:
        raise ValueError("no")

    @manager.task
    async def hang() -> None:
        await asyncio.sleep(3_600)


def task(manager: TaskManager, name: str) -> Any:
    return manager.registry.named(name).function


def rows(manager: TaskManager, table: str) -> set[str]:
    with closing(sqlite3.connect(manager.backend_name.removeprefix("sqlite:///"), timeout=5)) as connection:
        return {task_id for (task_id,) in connection.execute(f"SELECT task_id FROM {table} WHERE task_id <> ''")}


async def one_of_each(start_manager: StartManager) -> tuple[TaskManager, dict[TaskStatus, str], set[str]]:
    """A manager, the id of a task in each terminal status, and the ids of those that run or wait."""
    queues = {"full": QueueConfig(max_size=1)}
    first = await start_manager(define, shutdown_timeout=0.1, queues=queues)
    ids = {TaskStatus.INTERRUPTED: await first.enqueue(task(first, "hang"))}
    await eventually(lambda: first.dispatcher.running == 1)
    await first.shutdown()
    manager = await start_manager(define, shutdown_timeout=0.1, queues=queues)
    ids[TaskStatus.SUCCESS] = await manager.enqueue(task(manager, "work"), "hard")
    ids[TaskStatus.FAILED] = await manager.enqueue(task(manager, "fail"))
    ids[TaskStatus.CANCELLED] = await manager.enqueue(task(manager, "work"), delay_seconds=3_600)
    await manager.store.cancel(ids[TaskStatus.CANCELLED])
    await drain(manager)
    await manager.store.pause_queue("full")
    pending = await manager.enqueue(task(manager, "work"), queue="full")
    with pytest.raises(QueueFullError):
        await manager.enqueue(task(manager, "work"), queue="full")
    (rejected,) = (await manager.store.page(TaskFilter(statuses=(TaskStatus.REJECTED,)))).tasks
    ids[TaskStatus.REJECTED] = rejected.task_id
    delayed = await manager.enqueue(task(manager, "work"), delay_seconds=3_600)
    running = await manager.enqueue(task(manager, "hang"))
    await eventually(lambda: manager.dispatcher.running == 1)
    return manager, ids, {pending, delayed, running}


def later(manager: TaskManager) -> datetime:
    return manager.clock() + timedelta(seconds=1)


# -- deleting


async def test_every_terminal_status_is_deleted_with_its_history_and_nothing_that_runs_or_waits(
    start_manager: StartManager,
) -> None:
    manager, ended, alive = await one_of_each(start_manager)
    assert {status for status in TaskStatus if status.terminal} == set(ended)
    for task_id in ended.values():
        assert task_id in rows(manager, "taskflow_event")
    assert rows(manager, "taskflow_log") == {ended[TaskStatus.SUCCESS]}
    assert await manager.store.prune(later(manager)) == len(ended)
    assert {record.task_id for record in await all_tasks(manager.backend)} == alive
    assert rows(manager, "taskflow_event") == alive
    assert rows(manager, "taskflow_log") == set()
    await assert_counters_match_rows(manager.backend, manager.clock())
    assert (await manager.store.metrics()).total == len(alive)
    assert await manager.store.prune(later(manager)) == 0


async def test_only_what_ended_before_the_given_time_is_deleted(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    manager.clock.freeze(NOON)
    old = await manager.enqueue(task(manager, "work"))
    slow = await manager.enqueue(task(manager, "work"), delay_seconds=1.5 * DAY)
    await drain(manager)
    manager.clock.advance(2 * DAY)
    await drain(manager)
    new = await manager.enqueue(task(manager, "work"))
    await drain(manager)
    assert await manager.store.prune(NOON) == 0  # what ended at that very moment did not end before it
    assert await manager.store.prune(NOON + timedelta(days=1)) == 1
    kept = {record.task_id for record in await all_tasks(manager.backend)}
    assert kept == {slow, new}  # one was added early, and ended late
    assert old not in kept


async def test_writers_go_on_between_the_batches(start_manager: StartManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.taskflow.store.PURGE_BATCH", 10)
    manager = await start_manager(define)
    ids = [await manager.enqueue(task(manager, "work"), str(number)) for number in range(200)]
    await drain(manager)
    turns: list[str] = []
    turn = manager.backend.turn

    async def watched(wanted: Turn) -> TurnResult:
        result = await turn(wanted)
        deleted = sum(answer.changed for answer in result.answers)
        assert deleted <= 10
        turns.extend("purge" for command in wanted.commands if isinstance(command, Purge))
        turns.extend("accept" for _ in wanted.drafts)
        return result

    monkeypatch.setattr(manager.backend, "turn", watched)
    before = later(manager)
    pruning = asyncio.create_task(manager.store.prune(before))
    added, slowest = 0, 0.0
    while not pruning.done():
        began = monotonic()
        await manager.enqueue(task(manager, "work"), "meanwhile", delay_seconds=3_600)
        slowest = max(slowest, monotonic() - began)
        added += 1
    assert await pruning == len(ids)
    assert turns.count("purge") >= 20
    first, last = turns.index("purge"), len(turns) - 1 - turns[::-1].index("purge")
    assert turns[first:last].count("accept") >= 5
    assert slowest < 1
    assert (await manager.store.metrics()).by_status[TaskStatus.PENDING] == added
    await assert_counters_match_rows(manager.backend, manager.clock())


async def test_deleting_the_history_leaves_one_entry_in_the_audit(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    for _ in range(3):
        await manager.enqueue(task(manager, "work"))
    await drain(manager)
    before = later(manager)
    assert await manager.store.delete_history(before, "ann") == 3
    (entry,) = [event for event in await manager.store.events_after(0) if event.actor is not None]
    assert (entry.kind, entry.actor, entry.task_id) == ("delete_history", "ann", "")
    assert json.loads(entry.detail or "") == {"before": before.isoformat(), "deleted": 3}
    await manager.store.prune(later(manager))
    assert entry in await manager.store.events_after(0)  # the audit outlives what it tells of


async def test_retention_deletes_by_itself_what_is_older_than_its_days(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.taskflow.housekeeping.RETENTION_INTERVAL", 0.05)
    manager = await start_manager(define, retention_days=1)
    manager.clock.freeze()
    old = await manager.enqueue(task(manager, "work"))
    await drain(manager)
    manager.clock.advance(0.9 * DAY)
    young = await manager.enqueue(task(manager, "work"))
    waiting = await manager.enqueue(task(manager, "work"), delay_seconds=30 * DAY)
    await drain(manager)
    assert len(await all_tasks(manager.backend)) == 3
    manager.clock.advance(0.2 * DAY)
    await eventually(lambda: gone(manager, old))
    assert {record.task_id for record in await all_tasks(manager.backend)} == {young, waiting}
    manager.clock.advance(DAY)
    await eventually(lambda: gone(manager, young))
    assert {record.task_id for record in await all_tasks(manager.backend)} == {waiting}


async def gone(manager: TaskManager, task_id: str) -> bool:
    return await manager.backend.get(task_id) is None


async def test_without_retention_everything_is_kept(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.taskflow.housekeeping.RETENTION_INTERVAL", 0.01)
    manager = await start_manager(define)
    manager.clock.freeze()
    task_id = await manager.enqueue(task(manager, "work"))
    await drain(manager)
    manager.clock.advance(10_000 * DAY)
    await asyncio.sleep(0.1)
    assert not await gone(manager, task_id)


# -- retrying many


async def failures(manager: TaskManager) -> tuple[str, str, str]:
    """Two of one function, a day apart, and one of another."""
    manager.clock.freeze(NOON)
    old = await manager.enqueue(task(manager, "fail"), "old")
    await drain(manager)
    manager.clock.advance(DAY)
    new = await manager.enqueue(task(manager, "fail"), "new")
    other = await manager.enqueue(task(manager, "fail_too"))
    await drain(manager)
    return old, new, other


async def retries(manager: TaskManager) -> Counter[str]:
    """How many attempts each task has had."""
    return Counter({record.task_id: record.attempt for record in await all_tasks(manager.backend)})


async def test_all_failed_tasks_are_retried_or_those_of_a_window_or_of_a_function(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    old, new, other = await failures(manager)
    succeeded = await manager.enqueue(task(manager, "work"))
    await drain(manager)

    retried = await manager.store.retry_failed(NOON + timedelta(hours=1), "fail", "ann")
    assert (dict(retried.new_ids), retried.skipped) == ({new: new}, 0)
    await drain(manager)
    assert await retries(manager) == {old: 1, new: 2, other: 1, succeeded: 1}

    retried = await manager.store.retry_failed(None, None, "ann")
    assert dict(retried.new_ids) == {old: old, other: other}
    await drain(manager)
    assert await retries(manager) == {old: 2, new: 2, other: 2, succeeded: 1}

    audit = [event for event in await manager.store.events_after(0) if event.kind == "bulk_retry"]
    assert [(event.actor, json.loads(event.detail or "")) for event in audit] == [
        (
            "ann",
            {
                "since": (NOON + timedelta(hours=1)).isoformat(),
                "func_name": "fail",
                "dispatched": 1,
                "skipped": 0,
            },
        ),
        ("ann", {"since": "all", "func_name": None, "dispatched": 2, "skipped": 0}),
    ]
    await assert_counters_match_rows(manager.backend, manager.clock())


async def test_all_failed_tasks_are_retried_however_many_pages_they_fill(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.taskflow.store.BATCH", 7)
    manager = await start_manager(define)
    ids = [await manager.enqueue(task(manager, "fail")) for _ in range(30)]
    await drain(manager)
    retried = await manager.store.retry_failed(None)
    assert set(retried.new_ids) == set(ids)
    await drain(manager)
    assert (await manager.store.metrics()).by_status[TaskStatus.SUCCESS] == 30


async def test_of_many_ids_each_is_retried_once_and_those_that_cannot_be_are_skipped(
    start_manager: StartManager,
) -> None:
    manager = await start_manager(define)
    old, new, _ = await failures(manager)
    succeeded = await manager.enqueue(task(manager, "work"))
    waiting = await manager.enqueue(task(manager, "work"), delay_seconds=3_600)
    await drain(manager)
    retried = await manager.store.retry_many([old, new, old, succeeded, waiting, "unknown", old], "ann")
    assert (dict(retried.new_ids), retried.skipped) == ({old: old, new: new}, 3)
    await drain(manager)
    attempts = await retries(manager)
    assert (attempts[old], attempts[new], attempts[succeeded]) == (2, 2, 1)
    (entry,) = [event for event in await manager.store.events_after(0) if event.kind == "bulk_retry"]
    assert entry.actor == "ann"
    assert json.loads(entry.detail or "") == {
        "task_ids": [old, new, succeeded, waiting, "unknown"],
        "dispatched": 2,
        "skipped": 3,
    }


async def test_a_retry_that_replaces_nothing_makes_a_new_task_that_points_back(start_manager: StartManager) -> None:
    manager = await start_manager(define, retry_replaces_original=False)
    old, new, _ = await failures(manager)
    retried = await manager.store.retry_many([old, new])
    await drain(manager)
    assert len({*retried.new_ids, *retried.new_ids.values()}) == 4
    for original, copy in retried.new_ids.items():
        record = await manager.store.get(copy)
        assert (record.retry_of, record.func_name) == (original, "fail")
        assert (await manager.store.get(original)).status is TaskStatus.FAILED


# -- what an earlier run left waiting


async def left_waiting(start_manager: StartManager) -> tuple[str, str]:
    """The ids of a task that waits for its turn and one that waits for its time, in a service that has stopped."""
    first = await start_manager(define)
    await first.store.pause_queue("default")
    pending = await first.enqueue(task(first, "work"), "pending")
    delayed = await first.enqueue(task(first, "work"), "delayed", delay_seconds=3_600)
    await first.shutdown()
    return pending, delayed


async def test_a_service_that_does_not_requeue_cancels_what_an_earlier_run_left_waiting(
    start_manager: StartManager,
) -> None:
    pending, delayed = await left_waiting(start_manager)
    manager = await start_manager(define, requeue_pending=False)
    for task_id in (pending, delayed):
        record = await manager.store.get(task_id)
        assert (record.status, record.attempt) == (TaskStatus.CANCELLED, 0)
    await manager.store.resume_queue("default")
    assert await manager.result(await manager.enqueue(task(manager, "work"), "new"), PATIENCE) == "new"
    await assert_counters_match_rows(manager.backend, manager.clock())


async def test_by_default_what_an_earlier_run_left_waiting_runs(start_manager: StartManager) -> None:
    pending, delayed = await left_waiting(start_manager)
    manager = await start_manager(define)
    await manager.store.resume_queue("default")
    assert await manager.result(pending, PATIENCE) == "pending"
    assert (await manager.store.get(delayed)).status is TaskStatus.PENDING


async def test_what_waits_is_left_alone_while_another_instance_serves_it(start_manager: StartManager) -> None:
    pending, delayed = await left_waiting(start_manager)
    await start_manager(define)
    manager = await start_manager(define, requeue_pending=False)
    records: list[TaskRecord] = [await manager.store.get(task_id) for task_id in (pending, delayed)]
    assert {record.status for record in records} == {TaskStatus.PENDING}


@pytest.mark.usefixtures("quick_refusals")
async def test_what_a_starting_service_itself_accepted_is_not_taken_for_an_earlier_run_s(
    start_manager: StartManager, tmp_path: Path
) -> None:
    pending, delayed = await left_waiting(start_manager)
    with closing(sqlite3.connect(tmp_path / "tasks.db", timeout=5, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        manager = await start_manager(define, requeue_pending=False)
        accepting = asyncio.create_task(manager.enqueue(task(manager, "work"), "mine"))
        await asyncio.sleep(0.05)
        other.execute("ROLLBACK")
    mine = await accepting
    await eventually(lambda: manager.unready() is None)
    await manager.store.resume_queue("default")
    assert await manager.result(mine, PATIENCE) == "mine"
    assert (await manager.store.get(pending)).status is TaskStatus.CANCELLED
    assert (await manager.store.get(delayed)).status is TaskStatus.CANCELLED


async def test_a_purge_counts_rows_of_every_kind(backend: Backend) -> None:
    """Two tasks of a thousand lines each hold the writer no longer than a thousand tasks without any."""
    bench = Bench(backend)
    ids = [await bench.add() for _ in range(3)]
    lines = [LogLine(task_id, bench.now, "info", 0, f"line {n}") for task_id in ids[:2] for n in range(100)]
    await bench.turn(logs=lines, commands=[Cancel(task_id, None) for task_id in ids])
    bench.pass_time(60)
    answers: list[Answer] = []
    while not answers or answers[-1].more:
        answers.append(await bench.obey(Purge(bench.now, 50)))
        left = sum([len(await backend.logs(task_id, 0, 1_000)) for task_id in ids])
        assert left >= 200 - 50 * len(answers)
    assert sum(answer.changed for answer in answers) == 3
    assert await all_tasks(backend) == []
    assert await backend.events_after(0, 100) == []
