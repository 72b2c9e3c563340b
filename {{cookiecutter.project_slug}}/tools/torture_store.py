"""The store that is tortured: one of the torture's own, or an empty one that somebody names.

Owns what is read from it, from outside the instances, and how it is taken away from them. The invariant: nothing is
written to a store that holds tasks or schedules, nor to the service's own.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from app.settings import settings
from app.taskflow import TaskStatus
from app.taskflow.backends import Backend, open_backend, parse_location
from app.taskflow.models import Cursor, TaskFilter, utc_now
from tests.taskflow.servers import PostgresServer, RedisServer, Server, ServerNotFound

from .torture_instance import NotTortured
from .torture_verdict import Stored


def is_file(url: str) -> bool:
    return parse_location(url).get_backend_name() == "sqlite"


def lock(url: str, seconds: float) -> None:
    path = parse_location(url).database or ""
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        connection.execute("ROLLBACK")


async def unfinished(url: str) -> int:
    backend = open_backend(url)
    try:
        return sum(count.n for count in await backend.counts() if not count.status.terminal)
    finally:
        await backend.close()


async def stored(url: str) -> dict[str, Stored]:
    """Every task that the store holds, by its id."""
    backend, found, now = open_backend(url), dict[str, Stored](), utc_now()
    before: Cursor | None = None
    try:
        while True:
            page = await backend.page(TaskFilter(), before, 500)
            for task in page.tasks:
                waits = task.status is TaskStatus.PENDING and task.run_at > now
                found[task.task_id] = Stored(task.func_name, task.status, waits)
            if (before := page.older) is None:
                return found
    finally:
        await backend.close()


async def refuse_used(url: str) -> None:
    """Raises NotTortured for the service's own store, and for one that holds anything."""
    backend = open_backend(url)
    try:
        if backend.name == open_backend(settings.url).name:
            raise NotTortured(f"{backend.name} is where the service keeps its tasks: name another store, an empty one")
        if await backend.is_current() and await holds_anything(backend):
            raise NotTortured(f"{backend.name} holds tasks or schedules: a torture runs on an empty store only")
    finally:
        await backend.close()


async def holds_anything(backend: Backend) -> bool:
    page = await backend.page(TaskFilter(), None, 1)
    return bool(page.tasks or await backend.schedules() or await asyncio.to_thread(backend.pulses))


@contextmanager
def store(url: str | None, kind: str, folder: Path) -> Iterator[tuple[str, Server | None]]:
    """The URL of an empty store, and its server where that is the torture's own. Raises NotTortured."""
    if url:
        asyncio.run(refuse_used(url))
        yield url, None
    elif kind == "sqlite":
        yield f"sqlite:///{folder / 'tasks.db'}", None
    else:
        try:
            with PostgresServer() if kind == "postgres" else RedisServer() as server:
                yield server.url, server
        except ServerNotFound as error:
            raise NotTortured(f"{error}. Or name an empty store with --url") from error
