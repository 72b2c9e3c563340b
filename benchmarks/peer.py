# mypy: ignore-errors
"""One worker process of another task system, or what adds its jobs: run by `peers.py`, in an environment of its own.

`python peer.py NAME add|work URL FILE N`: each job appends a byte to the file, as ours does, and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

NAME, ROLE, URL, FILE, N = sys.argv[1:6]
CONCURRENCY = 100
DONE = os.open(FILE, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)


def done() -> None:
    os.write(DONE, b".")


async def arq() -> None:
    from arq import create_pool
    from arq.connections import RedisSettings
    from arq.worker import Worker, func

    async def noop(_context: Any) -> None:
        done()

    settings = RedisSettings.from_dsn(URL)
    if ROLE == "add":
        pool = await create_pool(settings)
        for _ in range(int(N)):
            await pool.enqueue_job("noop")
    else:
        await Worker(
            [func(noop, name="noop")], redis_settings=settings, max_jobs=CONCURRENCY, poll_delay=0.01
        ).async_run()


async def saq() -> None:
    from saq import Queue, Worker

    async def noop(_context: Any) -> None:
        done()

    queue = Queue.from_url(URL)
    await queue.connect()
    if ROLE == "add":
        for _ in range(int(N)):
            await queue.enqueue("noop")
    else:
        await Worker(queue, [("noop", noop)], concurrency=CONCURRENCY).start()


async def taskiq() -> None:
    from taskiq.api import run_receiver_task
    from taskiq_redis import RedisStreamBroker

    broker = RedisStreamBroker(URL)

    @broker.task(task_name="noop")
    async def noop() -> None:
        done()

    await broker.startup()
    if ROLE == "add":
        for _ in range(int(N)):
            await noop.kiq()
    else:
        await run_receiver_task(broker, max_async_tasks=CONCURRENCY)


async def procrastinate() -> None:
    from procrastinate import App, PsycopgConnector

    app = App(connector=PsycopgConnector(conninfo=URL))

    @app.task(name="noop")
    async def noop() -> None:
        done()

    async with app.open_async():
        if ROLE == "add":
            await app.schema_manager.apply_schema_async()
            for _ in range(int(N)):
                await noop.defer_async()
        else:
            await app.run_worker_async(concurrency=CONCURRENCY, install_signal_handlers=False)


def celery() -> None:
    from celery import Celery

    app = Celery("peer", broker=URL)
    app.conf.update(task_acks_late=True, task_ignore_result=True, worker_prefetch_multiplier=1)

    @app.task(name="noop")
    def noop() -> None:
        done()

    if ROLE == "add":
        for _ in range(int(N)):
            noop.delay()
    else:
        app.worker_main(["worker", "--pool", "threads", "--concurrency", str(CONCURRENCY), "--loglevel", "ERROR"])


if __name__ == "__main__":
    assert Path(FILE).exists()
    peer = globals()[NAME]
    asyncio.run(peer()) if asyncio.iscoroutinefunction(peer) else peer()
