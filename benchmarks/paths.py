"""What each way of running a task costs, and what history costs: our own system beside itself."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

from app.taskflow import InMemoryLogger, QueueConfig, TaskManager
from app.taskflow.models import TaskFilter, TaskStatus
from cryptography.fernet import Fernet

CALLERS = 200
QUEUES = 1_000


async def async_noop(number: int) -> None: ...


def sync_noop(number: int) -> None: ...


def process_noop(number: int) -> None: ...


class Flaky:
    """Fails every task once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, number: int) -> None:
        if number not in self.seen:
            self.seen.add(number)
            raise RuntimeError("first time")


@asynccontextmanager
async def started(database: str, **options: Any) -> AsyncIterator[TaskManager]:
    manager = TaskManager(snapshot_db=database, **options)
    async with manager.lifespan():
        yield manager


async def run(manager: TaskManager, total: int, add: Callable[[int], Awaitable[object]]) -> float:
    """Tasks per second, from the first `enqueue` until the last one is recorded."""
    numbers = iter(range(total))
    before = (await manager.store.metrics()).by_status[TaskStatus.SUCCESS]
    start = perf_counter()

    async def caller() -> None:
        for number in numbers:
            await add(number)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    while (await manager.store.metrics()).by_status[TaskStatus.SUCCESS] < before + total:
        await asyncio.sleep(0.005)
    return total / (perf_counter() - start)


async def path(name: str, database: str) -> float:
    """Tasks per second of one way of running them."""
    options: dict[str, Any] = {}
    total = 10_000
    match name:
        case "encryption":
            options["encrypt_args_key"] = Fernet.generate_key()
        case "observers":
            options["loggers"] = [InMemoryLogger()]
        case "queues":
            options["queues"] = {f"q{number}": QueueConfig(concurrency=5) for number in range(QUEUES)}
        case "process":
            total = 2_000
    async with started(database, **options) as manager:
        task = manager.task
        match name:
            case "thread":
                task(sync_noop)
                return await run(manager, total, lambda number: manager.enqueue(sync_noop, number))
            case "process":
                task(executor="process")(process_noop)
                await manager.result(await manager.enqueue(process_noop, 0))
                return await run(manager, total, lambda number: manager.enqueue(process_noop, number))
            case "retries":
                flaky = Flaky()

                async def fail_once(number: int) -> None:
                    flaky(number)

                task(retries=1)(fail_once)
                return await run(manager, total, lambda number: manager.enqueue(fail_once, number))
            case _:
                task(async_noop)
                queued = name == "queues"
                return await run(
                    manager,
                    total,
                    lambda number: manager.enqueue(async_noop, number, queue=f"q{number % QUEUES}" if queued else None),
                )


async def history(rows: int, database: str) -> dict[str, float]:
    """Milliseconds of one `enqueue` and of two pages, and tasks per second, on so many finished tasks."""
    async with started(database) as manager:
        manager.task(async_noop)
        await manager.result(await manager.enqueue(async_noop, 0))
    fill(database, rows)
    async with started(database) as manager:
        manager.task(async_noop)
        await run(manager, 500, lambda number: manager.enqueue(async_noop, number))
        failed = TaskFilter(statuses=(TaskStatus.FAILED,))
        return {
            "enqueue_ms": await milliseconds(lambda: manager.enqueue(async_noop, 1)),
            "page_ms": await milliseconds(lambda: manager.store.page(TaskFilter())),
            "failed_page_ms": await milliseconds(lambda: manager.store.page(failed)),
            "tasks_per_second": await run(manager, 10_000, lambda number: manager.enqueue(async_noop, number)),
        }


async def milliseconds(call: Callable[[], Awaitable[object]], times: int = 200) -> float:
    start = perf_counter()
    for _ in range(times):
        await call()
    return (perf_counter() - start) / times * 1_000


def fill(database: str, rows: int) -> None:
    """Copies the one finished task that is there until there are so many, with its events and its count."""
    connection = sqlite3.connect(database)
    columns = [row[1] for row in connection.execute("PRAGMA table_info(taskflow_task)")]
    new = {"task_id": "printf('00000000-0000-7000-8000-%012d', n)", "created_at": "created_at - n * 1000"}
    values = ", ".join(new.get(column, column) for column in columns)
    numbers = f"WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < {rows})"
    if rows:
        with connection:
            connection.execute(
                f"INSERT INTO taskflow_task ({', '.join(columns)}) {numbers} SELECT {values} FROM taskflow_task, number"
            )
            connection.execute(
                "INSERT INTO taskflow_event (task_id, at, kind, attempt) "
                f"{numbers}, kind(kind) AS (VALUES ('accepted'), ('started'), ('succeeded')) "
                f"SELECT {new['task_id']}, n, kind, 0 FROM number, kind"
            )
            connection.execute("UPDATE taskflow_counter SET n = n + ? WHERE status = 'success'", (rows,))
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
    connection.close()
    os.sync()  # else the disk would still be writing the copies while we measure
