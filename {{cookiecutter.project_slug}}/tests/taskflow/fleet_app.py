"""What the Celery workers of the tests run: `FLEET_STORE` and `FLEET_BROKER` say where, `FLEET_FILE` gets a line for
each start of a task."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from app.taskflow import QueueConfig, TaskManager, get_task_context
from app.taskflow.delivery_worker import worker_app

FILE = Path(os.environ["FLEET_FILE"])


def note(name: str) -> None:
    context = get_task_context()
    assert context is not None
    with FILE.open("a") as lines:
        lines.write(f"{name} {context.task_id} {context.attempt} {os.getpid()}\n")


def compute(seconds: float) -> None:
    note("compute")
    time.sleep(seconds)


def define(store: str) -> TaskManager:
    queues = {"mail": QueueConfig(), "narrow": QueueConfig(concurrency=2)}
    manager = TaskManager(snapshot_db=store, queues=queues, max_process_workers=2, shutdown_timeout=5.0)
    manager.lease_seconds = 5.0
    manager.task(executor="process")(compute)

    @manager.task
    async def add_up(a: int, b: int) -> int:
        note("add_up")
        return a + b

    @manager.task(queue="mail", retries=1, delay=0.1)
    def second_try() -> str:
        note("second_try")
        context = get_task_context()
        assert context is not None
        if context.attempt == 0:
            raise OSError("not the first time")
        return "sent"

    @manager.task(queue="narrow")
    async def in_turn(seconds: float) -> None:
        note("in_turn")
        await asyncio.sleep(seconds)

    @manager.task(requeue_on_interrupt=True)
    async def again(seconds: float) -> None:
        note("again")
        await asyncio.sleep(seconds)

    @manager.task
    async def once(seconds: float) -> None:
        note("once")
        await asyncio.sleep(seconds)

    return manager


if "FLEET_BROKER" in os.environ:
    app = worker_app(define(os.environ["FLEET_STORE"]), os.environ["FLEET_BROKER"])
