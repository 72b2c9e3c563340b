"""How fast workers empty a full queue: `python -m benchmarks.drain [--workers N ...] [--rounds N] [STORE ...]`.

Each round fills a store with no-op tasks while nobody runs them, starts the workers, and counts from the moment at
which they may claim to the commit of the last result. Stores take turns. The servers are those of the tests.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from app.taskflow import TaskManager, TaskStatus

from .__main__ import PROJECT, ROOT, environment

STORES = ["sqlite", "postgres", "redis"]
TASKS = 10_000


def module_of_the_tests(name: str) -> Any:
    """Of the project's, whose package is called as the template's is."""
    package = ModuleType("tests_of_the_project")
    package.__path__ = [str(PROJECT / "tests" / "taskflow")]
    sys.modules.setdefault(package.__name__, package)
    return import_module(f"{package.__name__}.{name}")


@contextmanager
def location(store: str) -> Iterator[str]:
    servers = module_of_the_tests("servers")
    with tempfile.TemporaryDirectory() as folder:
        if store == "sqlite":
            yield f"sqlite:///{Path(folder) / 'tasks.db'}"
        elif store == "postgres":
            with servers.fresh_postgres(servers.postgres_url()) as url:
                yield url
        else:
            with servers.fresh_redis(servers.redis_url()) as url:
                yield url


def make_manager(url: str, *, runs: bool) -> TaskManager:
    manager = TaskManager(snapshot_db=url, shutdown_timeout=2.0)
    manager.runs_tasks = runs

    @manager.task
    async def nothing() -> None: ...

    return manager


async def work(url: str) -> None:
    """Says `ready`, waits for a word, runs tasks until its input ends."""
    manager = make_manager(url, runs=False)
    async with manager.lifespan():
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        manager.dispatcher.start()
        manager.journal.wake()
        await asyncio.to_thread(sys.stdin.read)


def start_worker(url: str) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, "-m", "benchmarks.drain", "--work", url], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=pipe, stdout=pipe, text=True)


async def drain(url: str, workers: int) -> float:
    """Tasks per second."""
    manager = make_manager(url, runs=False)
    async with manager.lifespan():
        function = manager.registry.named("nothing").function
        for _ in range(TASKS // 500):
            await asyncio.gather(*(manager.enqueue(function) for _ in range(500)))
        running = [start_worker(url) for _ in range(workers)]
        for process in running:
            await asyncio.to_thread(process.stdout.readline)  # type: ignore[union-attr]
        began = time.perf_counter()
        for process in running:
            process.stdin.write("go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        while sum(count.n for count in await manager.store.counts() if count.status is TaskStatus.SUCCESS) < TASKS:
            await asyncio.sleep(0.02)
        seconds = time.perf_counter() - began
        for process in running:
            process.stdin.close()  # type: ignore[union-attr]
        for process in running:
            await asyncio.to_thread(process.wait)
        return TASKS / seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stores", nargs="*", default=STORES)
    parser.add_argument("--workers", nargs="*", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work")
    given = parser.parse_args()
    if given.work:
        asyncio.run(work(given.work))
        return
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(given.rounds):
        for workers in given.workers:
            for store in given.stores:
                with location(store) as url:
                    found.setdefault((store, workers), []).append(asyncio.run(drain(url, workers)))
    for (store, workers), rates in found.items():
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        print(f"{store:10} {workers} workers: {median(rates):8,.0f} tasks/s ({spread})")


if __name__ == "__main__":
    main()
