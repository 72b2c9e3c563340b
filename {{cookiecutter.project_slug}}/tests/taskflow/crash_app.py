"""A small service to be killed: `python -m tests.taskflow.crash_app FD`.

Imports everything once, and for each line on its standard input, `[file, starts, shutdown_timeout]`, forks a process
that serves: a life costs milliseconds. Prints the pid, and its exit code when that process has ended. Each task appends
its id to the file `starts` when it starts, past the engine. FD is a listening socket of the parent, so that the port
outlives every life: clients that come between two of them wait for the next.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI

from app.taskflow import ManagedBackgroundTasks, TaskManager, get_task_context


def main(listening: int) -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            serve(listening, *json.loads(line))
            return  # and out of the interpreter, the way every process ends
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def serve(listening: int, file: str, starts_file: str, shutdown_timeout: float) -> None:
    starts = os.open(starts_file, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    manager = TaskManager(snapshot_db=file, max_sync_threads=40, shutdown_timeout=shutdown_timeout)
    app = FastAPI()
    manager.init_app(app)

    def note_start() -> None:
        context = get_task_context()
        assert context is not None
        os.write(starts, f"{context.task_id}\n".encode())

    @manager.task
    async def quick() -> None:
        note_start()

    @manager.task
    async def slow(seconds: float) -> None:
        note_start()
        await asyncio.sleep(seconds)

    @manager.task
    def blocking(seconds: float) -> None:
        note_start()
        time.sleep(seconds)

    @manager.task(requeue_on_interrupt=True)
    def again(seconds: float) -> None:
        note_start()
        time.sleep(seconds)

    @manager.task(retries=3, delay=0.05)
    async def flaky() -> None:
        context = get_task_context()
        assert context is not None
        if context.attempt == 0:
            raise ConnectionError("try again")
        note_start()

    functions: Mapping[str, Callable[..., Any]] = {
        "quick": quick,
        "slow": slow,
        "blocking": blocking,
        "again": again,
        "flaky": flaky,
    }

    @app.post("/add/{name}")
    async def add(
        name: str,
        tasks: Annotated[ManagedBackgroundTasks, Depends(manager.get_tasks)],
        seconds: float = 0.02,
        count: int = 1,
    ) -> list[str]:
        timed = name in ("slow", "blocking", "again")
        return [tasks.add_task(functions[name], *([seconds] if timed else [])) for _ in range(count)]

    @app.get("/ready")
    async def ready() -> bool:
        return manager.dispatcher.claiming

    config = uvicorn.Config(app, log_level="warning")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=os.dup(listening))])


if __name__ == "__main__":
    main(int(sys.argv[1]))
