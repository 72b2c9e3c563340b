"""fastapi-taskflow from PyPI, with `snapshot_db`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import BackgroundTasks, FastAPI
from fastapi_taskflow import ManagedBackgroundTasks, TaskAdmin, TaskManager  # type: ignore[import-not-found, unused-ignore]


class Session:
    def __init__(self, database: str) -> None:
        self.manager = TaskManager(snapshot_db=database)
        self.count = 0

        @self.manager.task(persist=True)
        async def async_noop(number: int) -> None:
            self.count += 1

        @self.manager.task(persist=True)
        def sync_noop(number: int) -> None:
            self.count += 1

        self.tasks: dict[str, Callable[..., Any]] = {"async": async_noop, "sync": sync_noop}

    async def request(self, kind: str, count: int) -> None:
        background_tasks = ManagedBackgroundTasks(self.manager)
        for number in range(count):
            background_tasks.add_task(self.tasks[kind], number)
        await background_tasks()

    async def finished(self) -> int:
        return self.count


@asynccontextmanager
async def session(database: str) -> AsyncIterator[Session]:
    running = Session(database)
    started = running.manager.startup()
    if asyncio.iscoroutine(started):
        await started
    try:
        yield running
    finally:
        stopped = running.manager.shutdown()
        if asyncio.iscoroutine(stopped):
            await stopped


def make_app(database: str) -> FastAPI:
    manager = TaskManager(snapshot_db=database)
    app = FastAPI()
    TaskAdmin(app, manager, auto_install=True)

    @manager.task(retries=3, delay=1.0, backoff=2.0, persist=True)
    def send_email(address: str) -> None: ...

    @app.post("/signup")
    def signup(email: str, background_tasks: BackgroundTasks) -> dict[str, str]:
        return {"task_id": background_tasks.add_task(send_email, address=email)}  # type: ignore[dict-item, func-returns-value]

    return app
