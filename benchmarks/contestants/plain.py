"""Starlette's own BackgroundTasks: nothing stored, nothing retried, nothing shown."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import BackgroundTasks, FastAPI


class Session:
    def __init__(self) -> None:
        self.count = 0

    async def request(self, kind: str, count: int) -> None:
        background_tasks = BackgroundTasks()
        for number in range(count):
            background_tasks.add_task(self.async_noop if kind == "async" else self.sync_noop, number)
        await background_tasks()

    async def async_noop(self, number: int) -> None:
        self.count += 1

    def sync_noop(self, number: int) -> None:
        self.count += 1

    async def finished(self) -> int:
        return self.count


@asynccontextmanager
async def session(_database: str) -> AsyncIterator[Session]:
    yield Session()


def send_email(address: str) -> None: ...


def make_app(_database: str) -> FastAPI:
    app = FastAPI()

    @app.post("/signup")
    def signup(email: str, background_tasks: BackgroundTasks) -> dict[str, str]:
        background_tasks.add_task(send_email, address=email)
        return {"task_id": "none"}

    return app
