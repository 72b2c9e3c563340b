"""The smallest program with the command line: `python -m tests.taskflow.cli_app COMMAND...`, tasks in $TASKS."""

import asyncio
import os
import sys
from pathlib import Path

from app.taskflow import TaskManager, task_log
from app.taskflow.cli import main


def make_manager(file: str, *, requeue_pending: bool = True) -> TaskManager:
    manager = TaskManager(snapshot_db=file, shutdown_timeout=10.0, requeue_pending=requeue_pending)

    @manager.task
    async def greet(name: str) -> str:
        task_log(f"hello {name}")
        return name

    @manager.task
    async def slow(file: str, seconds: float) -> str:
        Path(file).touch()  # noqa: ASYNC240
        await asyncio.sleep(seconds)
        return "ended in order"

    @manager.task
    async def fail(text: str) -> None:
        raise ValueError(text)

    return manager


if __name__ == "__main__":
    sys.exit(main(make_manager(os.environ["TASKS"])))
