"""A row that cannot be read costs nobody else anything: the others run, and every list and page shows it as broken."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.taskflow import QueueConfig, TaskAdmin, TaskManager, TaskStatus, task_log
from app.taskflow.backends import open_backend
from app.taskflow.backends.base import (
    Backend,
    Cancel,
    DeclaredSchedule,
    DeclareQueues,
    DeclareSchedules,
    Fire,
    Firing,
    Purge,
    Requeue,
)

from .helpers import START, Bench, all_tasks, eventually, make_draft

pytestmark = pytest.mark.anyio

NO_UTF8 = "CAST(x'5b5b5d2c7bff7d5d' AS TEXT)"
BLOB = "x'5b5b5d2c7b7d5d'"
UNRUNNABLE = [
    ("arguments", NO_UTF8),
    ("arguments", BLOB),
    ("tags", NO_UTF8),
    ("tags", BLOB),
    ("trace", NO_UTF8),
    ("name", BLOB),
    ("max_attempts", "'many'"),
    ("excused", BLOB),
    ("attempt", "'x'"),
    ("requeue", "'perhaps'"),
    ("started_at", "9e300"),
    ("task_id", "CAST(x'61ff' AS TEXT)"),
    ("task_id", "x'62ff'"),
]
"""Columns that a claim reads, and what may stand in them."""
JUNK = [
    *UNRUNNABLE,
    ("status", "'weird'"),
    ("status", BLOB),
    ("queue", BLOB),
    ("executor", "'quantum'"),
    ("source", BLOB),
    ("priority", "'high'"),
    ("created_at", "'yesterday'"),
    ("created_at", "9223372036854775807"),
    ("created_at", "-9223372036854775808"),
    ("run_at", BLOB),
    ("finished_at", "1.5"),
    ("tags", "'{\"a\":'"),
    ("tags", "'[1]'"),
    ("progress", '\'{"done": {}, "total": []}\''),
    ("progress", "'['"),
    ("result", NO_UTF8),
    ("result", BLOB),
    ("result", "replace(hex(zeroblob(50000)), '0', '[')"),
    ("error", NO_UTF8),
    ("stacktrace", BLOB),
    ("instance", NO_UTF8),
    ("idempotency_key", BLOB),
    ("cancel_requested", "'perhaps'"),
    ("schedule", NO_UTF8),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tasks.db"


@pytest.fixture
async def backend(file: Path) -> AsyncIterator[Backend]:
    opened = open_backend(str(file))
    await opened.open()
    yield opened
    await opened.close()


def damage(file: Path, change: str, *values: object) -> None:
    """What somebody with a hex editor might do."""
    with closing(sqlite3.connect(file, timeout=5)) as connection, connection:
        assert connection.execute(change, values).rowcount > 0


@pytest.mark.parametrize(("column", "junk"), UNRUNNABLE)
async def test_what_waits_behind_a_broken_row_runs_and_the_row_fails(
    backend: Backend, file: Path, column: str, junk: str
) -> None:
    bench = Bench(backend)
    broken, second, third = [await bench.add() for _ in range(3)]
    damage(file, f"UPDATE taskflow_task SET {column} = {junk} WHERE task_id = ?", broken)
    claimed: list[str] = []
    for _ in range(4):
        claimed += [task.task_id for task in await bench.claim(1)]
    assert sorted(claimed) == [second, third]
    [failed] = [task for task in await all_tasks(backend) if task.task_id not in (second, third)]
    assert failed.status is TaskStatus.FAILED
    assert failed.error is not None
    assert f"its {column} cannot be read" in failed.error


async def test_a_lost_task_whose_row_is_broken_does_not_keep_others_from_being_rescued(
    backend: Backend, file: Path
) -> None:
    lost = Bench(backend, "lost")
    ids = [await lost.add(requeue=True) for _ in range(3)]
    assert len(await lost.claim()) == 3
    damage(file, "UPDATE taskflow_task SET crashes = 'often' WHERE task_id = ?", ids[0])
    await Bench(backend, "other").rescue("lost")
    found = {task.task_id: task.status for task in await all_tasks(backend)}
    assert [found[task_id] for task_id in ids] == [TaskStatus.FAILED, TaskStatus.PENDING, TaskStatus.PENDING]


async def test_a_delayed_row_with_a_time_that_is_none_keeps_no_other_waiting(backend: Backend, file: Path) -> None:
    bench = Bench(backend)
    later = START.replace(year=2027)
    broken, delayed = await bench.add(run_at=later), await bench.add(run_at=later)
    damage(file, "UPDATE taskflow_task SET run_at = 'soon' WHERE task_id = ?", broken)
    bench.now = later
    assert [task.task_id for task in await bench.claim()] == [delayed]


@pytest.mark.parametrize(
    "change",
    [
        f"UPDATE taskflow_counter SET queue = {BLOB} WHERE name = 'other'",
        f"UPDATE taskflow_counter SET name = {NO_UTF8} WHERE name = 'other'",
        "UPDATE taskflow_counter SET n = 'many' WHERE name = 'other'",
        "UPDATE taskflow_queue SET concurrency = 'many', version = version + 1 WHERE name = 'mail'",
        f"UPDATE taskflow_queue SET max_size = {BLOB}, paused = 'no', version = version + 1 WHERE name = 'mail'",
        f"UPDATE taskflow_queue SET name = {BLOB}, reason = {NO_UTF8}, version = version + 1 WHERE name = 'mail'",
    ],
)
async def test_a_broken_count_or_limit_stops_no_turn(backend: Backend, file: Path, change: str) -> None:
    bench = Bench(backend)
    await bench.turn(commands=[DeclareQueues({"mail": QueueConfig(concurrency=5)})])
    await bench.add("other")
    wanted = await bench.add("job")
    damage(file, change)
    assert wanted in [task.task_id for task in await bench.claim()]
    await bench.add("job")
    assert len(await backend.queues()) >= 1


async def test_a_broken_schedule_keeps_no_other_from_firing(backend: Backend, file: Path) -> None:
    bench = Bench(backend)
    declared = [
        DeclaredSchedule(name, "job", "every 60 s", "UTC", overlap=True, misfire="once", next_tick=START)
        for name in ("broken", "good")
    ]
    answer = await bench.obey(DeclareSchedules(declared))
    since = answer.marks["good"].last_tick
    damage(file, "UPDATE taskflow_schedule SET last_tick = 'then', started_at = 'then' WHERE name = 'broken'")
    until = START.replace(year=2027)
    firings = [Firing(name, since, until, until, [make_draft()]) for name in ("broken", "good")]
    fired = await bench.obey(Fire(firings))
    assert list(fired.marks) == ["good"]
    assert len(await all_tasks(backend)) == 1
    assert [state.name for state in await backend.schedules()] == ["broken", "good"]


async def test_commands_for_a_broken_row_do_what_they_say(backend: Backend, file: Path) -> None:
    bench = Bench(backend)
    unknown, broken = await bench.add(), await bench.add()
    damage(file, "UPDATE taskflow_task SET status = 'weird' WHERE task_id = ?", unknown)
    damage(file, "UPDATE taskflow_task SET tags = x'00', priority = 'high' WHERE task_id = ?", broken)
    result = await bench.turn(
        commands=[Cancel(unknown, "ann"), Requeue(unknown, 1, "ann"), Cancel(broken, "ann"), Cancel("nobody", "ann")]
    )
    assert [answer.changed for answer in result.answers] == [0, 1, 1, 0]
    found = {task.task_id: task.status for task in await all_tasks(backend)}
    assert found == {unknown: TaskStatus.PENDING, broken: TaskStatus.CANCELLED}


@pytest.mark.parametrize(("column", "junk"), [("started_at", "'then'"), ("name", BLOB), ("task_id", BLOB)])
async def test_broken_rows_are_purged_like_others(backend: Backend, file: Path, column: str, junk: str) -> None:
    bench = Bench(backend)
    ids = [await bench.add() for _ in range(3)]
    await bench.turn(commands=[Cancel(task_id, None) for task_id in ids])
    damage(file, f"UPDATE taskflow_task SET {column} = {junk} WHERE task_id = ?", ids[0])
    bench.pass_time(3_600)
    assert (await bench.turn(commands=[Purge(bench.now, 100)])).answers[0].changed == 3
    assert await all_tasks(backend) == []


async def test_every_list_and_page_shows_broken_rows_and_the_others_as_they_are(file: Path) -> None:
    manager = TaskManager(snapshot_db=str(file))

    @manager.task
    def job(number: int) -> int:
        task_log("hello", number=number)
        return number

    app = FastAPI()
    TaskAdmin(app, manager, display_func_args=True)
    with TestClient(app, client=("127.0.0.1", 1), base_url="http://127.0.0.1") as client:

        async def add() -> list[str]:
            return [await manager.enqueue(job, number) for number in range(len(JUNK) + 1)]

        assert client.portal is not None
        *ids, good = client.portal.call(add)

        async def ended() -> bool:
            return (await manager.store.metrics()).by_status[TaskStatus.SUCCESS] == len(ids) + 1

        client.portal.call(eventually, ended)
        for task_id, (column, junk) in zip(ids, JUNK, strict=True):
            damage(file, f"UPDATE taskflow_task SET {column} = {junk} WHERE task_id = ?", task_id)
        damage(
            file, f"UPDATE taskflow_event SET kind = {BLOB}, at = 'then', detail = {NO_UTF8} WHERE task_id = ?", ids[0]
        )
        damage(file, f"UPDATE taskflow_log SET message = {BLOB}, at = 'then', extra = '[' WHERE task_id = ?", ids[0])
        damage(file, f"UPDATE taskflow_instance SET host = {NO_UTF8}, slots = 'many'")
        addresses = [
            "",
            "?limit=1",
            "?q=job",
            "/metrics",
            "/queues",
            "/schedules",
            "/scheduled",
            "/instances",
            "/audit",
        ]
        addresses += [f"/{task_id}{part}" for task_id in ids for part in ("", "/events", "/logs")]
        pages = ["", "/tasks", "/tasks?q=status:failed"]
        addresses += [f"/dashboard{page}" for page in pages] + [f"/dashboard/tasks/{task_id}" for task_id in ids]
        found = {
            address: client.get(f"/tasks{address}", headers={"Accept": "*/*"}).status_code for address in addresses
        }
        gone = {
            f"/{task_id}{part}"
            for task_id, (column, _) in zip(ids, JUNK, strict=True)
            for part in ("", "/events", "/logs")
            if column == "task_id"
        }
        gone |= {f"/dashboard{'/tasks'}{address}" for address in gone}
        assert {address: code for address, code in found.items() if code != 200 and address not in gone} == {}

        listed: dict[str, Any] = {row["task_id"]: row for row in client.get("/tasks?limit=500").json()}
        assert len(listed) == len(ids) + 1
        assert (listed[good]["status"], listed[good]["error"], listed[good]["result"]) == ("success", None, len(ids))
        weird = listed[ids[JUNK.index(("status", "'weird'"))]]
        assert (weird["status"], weird["error"]) == ("failed", "broken row: its status 'weird' cannot be read")
        assert "its arguments" in client.get(f"/tasks/{ids[1]}").json()["error"]
        seen: list[str] = []
        address: str | None = "/tasks?limit=7"
        while address:
            answer = client.get(address)
            seen += [row["task_id"] for row in answer.json()]
            address = answer.links.get("next", {}).get("url")
        assert sorted(seen) == sorted(listed)


async def test_a_call_of_broken_json_fails_with_the_reason(file: Path) -> None:
    manager = TaskManager(snapshot_db=str(file))

    @manager.task
    def job(number: int) -> int:
        return number

    await manager.startup()
    try:
        waiting = await manager.enqueue(job, 1, delay_seconds=3_600)
        damage(
            file,
            "UPDATE taskflow_task SET arguments = '[[1', status = 'pending', run_at = 0 WHERE task_id = ?",
            waiting,
        )
        damage(file, "UPDATE taskflow_counter SET status = 'pending' WHERE status = 'delayed'")
        assert await manager.result(await manager.enqueue(job, 2), timeout=10) == 2

        async def failed() -> bool:
            return (await manager.store.get(waiting)).status is TaskStatus.FAILED

        await eventually(failed)
    finally:
        await manager.shutdown()
