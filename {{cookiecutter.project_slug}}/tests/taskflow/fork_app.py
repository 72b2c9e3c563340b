"""Workers forked from a process that has made the manager, as `gunicorn --preload` does: for `test_forks.py`.

`python -m tests.taskflow.fork_app HISTORY FOLDER`: the parent imports, and with the history `used` has run a task and
stopped, with `running` still serves; then it forks two workers one after the other. A worker says `ready PID` once its
task runs, and ends after its standard input has; with the history `running` it says why it does not start.
"""

import asyncio
import os
import sys

from app.taskflow import TaskflowError, TaskManager


def make_manager(folder: str) -> TaskManager:
    manager = TaskManager(snapshot_db=f"{folder}/tasks.db", shutdown_timeout=5.0)

    @manager.task
    async def who() -> int:
        return os.getpid()

    @manager.task
    def plain() -> int:
        return os.getpid()

    @manager.task(requeue_on_interrupt=True)
    async def again(folder: str) -> int:
        note(folder)
        while not os.path.exists(f"{folder}/release"):  # noqa: ASYNC240 - another process makes it
            await asyncio.sleep(0.02)
        return os.getpid()

    return manager


def note(folder: str) -> None:
    with open(f"{folder}/starts", "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")


async def use(manager: TaskManager) -> None:
    for name in ("who", "plain"):
        task_id = await manager.enqueue(manager.registry.named(name).function)
        assert await manager.result(task_id, 10) == os.getpid()


async def live(manager: TaskManager, folder: str, *, first: bool) -> None:
    try:
        await manager.startup()
    except TaskflowError as error:
        print(f"{error}\n", end="", flush=True)  # one write: both workers write to one pipe
        return
    await use(manager)
    if first:
        await manager.enqueue(manager.registry.named("again").function, folder)
    print(f"ready {os.getpid()} {manager.instance_id}\n", end="", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await manager.shutdown()


def fork(manager: TaskManager, folder: str, *, first: bool) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(live(manager, folder, first=first))
        finally:
            os._exit(0)
    return pid


async def begin(manager: TaskManager, history: str) -> None:
    await manager.startup()
    await use(manager)
    if history == "used":
        await manager.shutdown()


def main() -> None:
    history, folder = sys.argv[1:]
    manager = make_manager(folder)
    if history != "imported":
        loop = asyncio.new_event_loop()
        loop.run_until_complete(begin(manager, history))
    workers = [fork(manager, folder, first=first) for first in (True, False)]
    for pid in workers:
        os.waitpid(pid, 0)
    os._exit(0)


if __name__ == "__main__":
    main()
