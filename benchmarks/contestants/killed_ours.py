"""Ours under `killed.py`: embedded on PostgreSQL, or in Celery workers where there is a RabbitMQ too."""

from __future__ import annotations

import asyncio
import os
import sys

from app.taskflow import TaskManager, housekeeping
from app.taskflow.delivery_worker import worker_app

from .killed_job import CONCURRENCY, JOBS, run

RABBIT = os.environ.get("KILLED_RABBIT")


def define() -> TaskManager:
    manager = TaskManager(snapshot_db=os.environ["KILLED_POSTGRES"], max_concurrent_tasks=CONCURRENCY)
    manager.task(name="job", requeue_on_interrupt=True)(run)
    return manager


async def add() -> None:
    manager = define()
    manager.runs_tasks = False
    manager.deliver_by(RABBIT)
    async with manager.lifespan():
        for number in range(JOBS):
            await manager.enqueue(run, number)
        await asyncio.sleep(1)  # until they are announced


async def work() -> None:
    if "apart" in sys.argv:  # each is on a machine of its own, for all that the others know
        vars(housekeeping)["machine_name"] = lambda: str(os.getpid())
    async with define().lifespan():
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(work() if "work" in sys.argv else add())
elif RABBIT:
    app = worker_app(define(), RABBIT)
