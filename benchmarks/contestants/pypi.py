"""fastapi-taskflow from PyPI, with `snapshot_db`."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import BackgroundTasks, FastAPI

taskflow: Any = importlib.import_module("fastapi_taskflow")


class Session:
    def __init__(self, database: str) -> None:
        self.manager = taskflow.TaskManager(snapshot_db=database)
        self.count = 0

        async def async_noop(number: int) -> None:
            self.count += 1

        def sync_noop(number: int) -> None:
            self.count += 1

        task = self.manager.task(persist=True)
        self.tasks: dict[str, Callable[..., Any]] = {"async": task(async_noop), "sync": task(sync_noop)}

    async def request(self, kind: str, count: int) -> None:
        background_tasks = taskflow.ManagedBackgroundTasks(self.manager)
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
    manager = taskflow.TaskManager(snapshot_db=database)
    app = FastAPI()
    taskflow.TaskAdmin(app, manager, auto_install=True)

    def send_email(address: str) -> None: ...

    manager.task(retries=3, delay=1.0, backoff=2.0, persist=True)(send_email)

    @app.post("/signup")
    def signup(email: str, background_tasks: BackgroundTasks) -> dict[str, str]:
        return {"task_id": background_tasks.add_task(send_email, address=email)}  # type: ignore[dict-item, func-returns-value]

    return app
