"""A program with worker processes, to be killed: `python -m tests.taskflow.process_app FILE END HOW...`.

Starts a task for each HOW, whose worker writes its pid into FILE, and says so. With END `leave` it ends by itself when
it reads a line, without closing anything; with `stop` it shuts down after a SIGINT; with `stay` it does neither.
"""

import asyncio
import signal
import sys
import time

from app.taskflow import TaskManager

from . import process_tasks

manager = TaskManager(max_process_workers=4, shutdown_timeout=0.1)


@manager.task(executor="process")
def hold(how: str, file: str) -> None:
    """Its workers find it in this file, which is their main module too."""
    print(f"{how} begins")
    process_tasks.hold(how, file)


async def main(file: str, end: str, kinds: list[str]) -> None:
    stop = asyncio.Event()
    if end == "stop":
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    await manager.startup()
    for kind in kinds:
        await manager.enqueue(hold, kind, file)
    print("started", flush=True)
    if end == "leave":
        await asyncio.to_thread(sys.stdin.readline)
        sys.exit(5)
    await stop.wait()
    await manager.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
elif sys.argv[2] == "stop":
    print("a worker starts", flush=True)
    time.sleep(0.5)  # as its imports would
