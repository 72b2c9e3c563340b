"""PostgreSQL behind a pooler in transaction mode: connections change between any two transactions.

It needs PgBouncer on PATH; with `TASKFLOW_POOLER=required` these tests fail without one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from app.taskflow import TaskManager, TaskStatus, get_task_context

from .conftest import StartManager
from .helpers import eventually
from .servers import Server, fresh_postgres, postgres_url, unprivileged

pytestmark = pytest.mark.anyio
MISSING = "there is no PgBouncer on PATH"


def pgbouncer() -> str | None:
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")


class Pooler(Server):
    """In front of one database, with fewer connections than its clients have."""

    def __init__(self, database: str) -> None:
        super().__init__()
        self._database = urlsplit(database)

    @property
    def url(self) -> str:
        return self._database._replace(netloc=f"postgres@127.0.0.1:{self.port}").geturl()

    @property
    def user(self) -> dict[str, Any]:
        return unprivileged() if os.geteuid() == 0 else {}

    def prepare(self) -> None:
        if self.user:
            self.directory.chmod(0o755)
            shutil.chown(self.directory, self.user["user"], self.user["group"])

    def command(self, port: int) -> list[str]:
        there = self._database
        lines = [
            "[databases]",
            f"* = host={there.hostname} port={there.port or 5432} user={there.username or 'postgres'}",
            "[pgbouncer]",
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any",
            "pool_mode = transaction\ndefault_pool_size = 4\nmax_client_conn = 100",
        ]
        file = self.directory / "pgbouncer.ini"
        file.write_text("\n".join(lines) + "\n")
        return [pgbouncer() or "pgbouncer", str(file)]

    def answers(self) -> bool:
        try:
            with psycopg.connect(self.url, connect_timeout=5) as connection:
                return connection.execute("SELECT 1").fetchone() == (1,)
        except psycopg.Error:
            return False


@pytest.fixture
def pooled() -> Iterator[str]:
    if pgbouncer() is None:
        if os.environ.get("TASKFLOW_POOLER") == "required":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    with fresh_postgres(postgres_url()) as database, Pooler(database) as pooler:
        yield pooler.url


def define(manager: TaskManager) -> None:
    @manager.task(retries=1, delay=0.01)
    async def second_try(n: int) -> int:
        context = get_task_context()
        assert context is not None
        if n % 10 == 0 and context.attempt == 0:
            raise OSError("not the first time")
        return n

    @manager.task
    async def waits() -> None:
        await asyncio.sleep(60)


async def test_two_instances_share_it_as_they_would_share_the_server(pooled: str, start_manager: StartManager) -> None:
    first = await start_manager(define, snapshot_db=pooled)
    second = await start_manager(define, snapshot_db=pooled)
    managers = (first, second)
    ids = await asyncio.gather(
        *(managers[n % 2].enqueue(managers[n % 2].registry.named("second_try").function, n) for n in range(200))
    )
    results = await asyncio.gather(*(managers[n % 2].result(task_id, 30) for n, task_id in enumerate(ids)))
    assert results == list(range(200))
    assert (await first.store.metrics()).by_status[TaskStatus.SUCCESS] == 200
    assert len(await first.store.instances()) == 2


async def test_what_one_instance_runs_is_cancelled_through_another(pooled: str, start_manager: StartManager) -> None:
    first = await start_manager(define, snapshot_db=pooled)
    task_id = await first.enqueue(first.registry.named("waits").function)

    async def has(status: TaskStatus) -> bool:
        return (await first.store.get(task_id)).status is status

    await eventually(lambda: has(TaskStatus.RUNNING))
    second = await start_manager(define, snapshot_db=pooled)
    await second.store.cancel(task_id, "ada")
    await eventually(lambda: has(TaskStatus.CANCELLED))


async def test_one_key_from_two_instances_is_one_task(pooled: str, start_manager: StartManager) -> None:
    managers = [await start_manager(define, snapshot_db=pooled) for _ in range(2)]
    adding = [
        manager.enqueue(manager.registry.named("second_try").function, 1, idempotency_key="once")
        for manager in managers * 16
    ]
    assert len(set(await asyncio.gather(*adding))) == 1
