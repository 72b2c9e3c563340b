"""Redis behind Sentinel: the primary is found by its name, and another one when it has gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import pytest
import redis

from app.taskflow import BackendUnavailable, TaskManager

from .conftest import StartManager
from .helpers import eventually
from .servers import RedisServer, Server, redis_program

pytestmark = pytest.mark.anyio
NAME = "tasks"


class Replica(RedisServer):
    def __init__(self, primary: RedisServer) -> None:
        super().__init__()
        self._primary = primary

    def command(self, port: int) -> list[str]:
        return [*super().command(port), "--replicaof", "127.0.0.1", str(self._primary.port)]


class Sentinel(Server):
    """One is enough to decide: quorum 1."""

    def __init__(self, primary: RedisServer) -> None:
        super().__init__()
        self._primary = primary

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0?sentinel={NAME}"

    def prepare(self) -> None:
        lines = [
            f"sentinel monitor {NAME} 127.0.0.1 {self._primary.port} 1",
            f"sentinel down-after-milliseconds {NAME} 500",
            f"sentinel failover-timeout {NAME} 2000",
        ]
        self._file.write_text("\n".join(lines) + "\n")

    @property
    def _file(self) -> Path:
        return self.directory / "sentinel.conf"

    def command(self, port: int) -> list[str]:
        where = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(self.directory)]
        return [str(redis_program()), str(self._file), "--sentinel", *where]

    def answers(self) -> bool:
        try:
            with redis.Redis(port=self.port, socket_timeout=5) as client:
                return bool(client.sentinel_master(NAME)["port"])
        except redis.RedisError:
            return False

    def primary(self) -> int:
        """The port of whoever is the primary now."""
        with redis.Redis(port=self.port, socket_timeout=5) as client:
            return int(client.sentinel_get_master_addr_by_name(NAME)[1])

    def replicas(self) -> int:
        with redis.Redis(port=self.port, socket_timeout=5) as client:
            return int(client.sentinel_master(NAME)["num-slaves"])


@dataclass
class Watched:
    primary: RedisServer
    sentinel: Sentinel


@pytest.fixture
def watched() -> Iterator[Watched]:
    with RedisServer() as primary, Replica(primary), Sentinel(primary) as sentinel:
        deadline = monotonic() + 30
        while not sentinel.replicas():
            assert monotonic() < deadline
            sleep(0.1)
        yield Watched(primary, sentinel)


def define(manager: TaskManager) -> None:
    @manager.task
    async def add_up(a: int, b: int) -> int:
        return a + b


async def test_tasks_go_on_with_the_new_primary(watched: Watched, start_manager: StartManager) -> None:
    manager = await start_manager(define, snapshot_db=watched.sentinel.url)
    add_up = manager.registry.named("add_up").function
    first = await manager.enqueue(add_up, 1, 2)
    assert await manager.result(first, 10) == 3
    with redis.Redis(port=watched.primary.port) as client:
        assert client.wait(1, 5_000) == 1  # replication is asynchronous: what it has not, a failover loses
    watched.primary.kill()
    assert await eventually(lambda: watched.sentinel.primary() != watched.primary.port, 30)

    async def takes_tasks() -> str | None:
        try:
            return await manager.enqueue(add_up, 20, 22)
        except BackendUnavailable:
            return None

    second = await eventually(takes_tasks, 30)
    assert await manager.result(second, 10) == 42
    assert await manager.result(first, 10) == 3
    assert manager.unready() is None
