"""What the processes of `fleet.py` run: workers of ours, plain Celery workers, and services that accept tasks.

`FLEET_STORE`, `FLEET_BROKER` and `FLEET_FOLDER` say where; each start of a task is a line in a file of the folder.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from app.taskflow import BackendUnavailable, TaskManager, get_task_context
from app.taskflow.delivery import celery_app
from app.taskflow.delivery_worker import worker_app

FOLDER = Path(os.environ["FLEET_FOLDER"])
STORE, BROKER = os.environ["FLEET_STORE"], os.environ["FLEET_BROKER"]
STARTS = os.open(FOLDER / "starts", os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)


def define() -> TaskManager:
    manager = TaskManager(snapshot_db=STORE, shutdown_timeout=5.0)

    def note() -> None:
        context = get_task_context()
        assert context is not None
        os.write(STARTS, f"{context.task_id} {context.func_name}\n".encode())

    @manager.task
    async def short() -> None:
        note()

    @manager.task
    def plain() -> None:
        note()

    @manager.task
    async def once(seconds: float) -> None:
        note()
        await asyncio.sleep(seconds)

    @manager.task(requeue_on_interrupt=True)
    async def again(seconds: float) -> None:
        note()
        await asyncio.sleep(seconds)

    return manager


async def accept(most: int) -> None:
    """Adds tasks until it is told to stop, or there are so many; each id is noted once it is promised."""
    manager = define()
    manager.deliver_by(BROKER)
    accepted = os.open(FOLDER / "accepted", os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with manager.lifespan():
        names, weights = ("short", "plain", "once", "again"), (6, 2, 1, 1)
        while not stopping.is_set() and len((FOLDER / "accepted").read_bytes().splitlines()) < most:
            (name,) = random.choices(names, weights)
            args: tuple[Any, ...] = (random.uniform(0.01, 0.5),) if name in ("once", "again") else ()
            try:
                task_id = await manager.enqueue(manager.registry.named(name).function, *args)
            except BackendUnavailable:
                continue
            os.write(accepted, f"{task_id} {name}\n".encode())
        await stopping.wait()


if "accept" in sys.argv:
    asyncio.run(accept(int(sys.argv[-1])))
elif os.environ.get("FLEET_PLAIN"):
    app = celery_app(BROKER, [])

    @app.task(name="plain.noop")  # type: ignore[untyped-decorator]
    def noop() -> None:
        os.write(STARTS, b"plain noop\n")
else:
    app = worker_app(define(), BROKER)
