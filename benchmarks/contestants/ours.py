"""The vendored task system of this template, on SQLite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from app.taskflow import TaskAdmin, TaskManager
from fastapi import BackgroundTasks, FastAPI
from starlette.requests import HTTPConnection


class Session:
    """One started system with an async and a plain no-op task."""

    def __init__(self, database: str, **options: Any) -> None:
        self.manager = TaskManager(snapshot_db=database, **options)

        @self.manager.task
        async def async_noop(number: int) -> None: ...

        @self.manager.task
        def sync_noop(number: int) -> None: ...

        self.tasks: dict[str, Callable[..., Any]] = {"async": async_noop, "sync": sync_noop}

    async def request(self, kind: str, count: int) -> None:
        """What one request with `count` tasks costs: the dependency's way in, `add_task`, and its way out."""
        dependency = self.manager.accept_tasks(HTTPConnection({"type": "http", "headers": []}), BackgroundTasks())
        background_tasks = await anext(dependency)
        for number in range(count):
            background_tasks.add_task(self.tasks[kind], number)
        await anext(dependency, None)

    async def finished(self) -> int:
        metrics = await self.manager.store.metrics()
        return sum(n for status, n in metrics.by_status.items() if status.terminal)


@asynccontextmanager
async def session(database: str) -> AsyncIterator[Session]:
    running = Session(database)
    async with running.manager.lifespan():
        yield running


def make_app(database: str) -> FastAPI:
    manager = TaskManager(snapshot_db=database)
    app = FastAPI()

    @manager.task(retries=3, delay=1.0, backoff=2.0)
    def send_email(address: str) -> None: ...

    @app.post("/signup")
    def signup(email: str, background_tasks: BackgroundTasks) -> dict[str, str]:
        return {"task_id": background_tasks.add_task(send_email, address=email)}  # type: ignore[dict-item, func-returns-value]

    TaskAdmin(app, manager, auto_install=True)
    return app
