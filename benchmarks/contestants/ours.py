"""The vendored task system of this template, on SQLite."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from app.taskflow import TaskAdmin, TaskManager, get_task_context
from app.taskflow.background import LEFT_AFTER_THE_ROUTE
from app.taskflow.models import Cursor, TaskFilter
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
        async with AsyncExitStack() as left_after_the_route:
            scope = {"type": "http", "headers": [], LEFT_AFTER_THE_ROUTE: left_after_the_route}
            background_tasks = await self.manager.get_tasks(HTTPConnection(scope), BackgroundTasks())
            for number in range(count):
                background_tasks.add_task(self.tasks[kind], number)

    async def finished(self) -> int:
        metrics = await self.manager.store.metrics()
        return sum(n for status, n in metrics.by_status.items() if status.terminal)


@asynccontextmanager
async def session(database: str) -> AsyncIterator[Session]:
    running = Session(database)
    async with running.manager.lifespan():
        yield running


class Lateness:
    """Seconds from tick to execution of every run."""

    def __init__(self, manager: TaskManager) -> None:
        self.manager = manager
        self.executed: dict[str, float] = {}

    async def noop(self) -> None:
        context = get_task_context()
        assert context is not None
        self.executed[context.task_id] = time.time()

    async def read(self) -> list[float]:
        found: list[float] = []
        cursor: Cursor | None = None
        while True:
            page = await self.manager.store.page(TaskFilter(source="scheduled"), cursor, 500)
            for task in page.tasks:
                if task.task_id in self.executed:
                    found.append(self.executed[task.task_id] - task.run_at.timestamp())
            if (cursor := page.older) is None:
                return found


@asynccontextmanager
async def schedules(database: str, count: int) -> AsyncIterator[Lateness]:
    """So many schedules of one second."""
    manager = TaskManager(snapshot_db=database)
    lateness = Lateness(manager)

    async def noop() -> None:
        await lateness.noop()

    for number in range(count):
        manager.schedule(every=1, name=str(number))(noop)
    async with manager.lifespan():
        yield lateness


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
