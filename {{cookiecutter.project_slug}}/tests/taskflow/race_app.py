"""Two processes that add the same task at the same time: `python -m tests.taskflow.race_app FILE STARTS CALLS`.

Each makes its calls as soon as both are ready, and prints the ids it got as a line of JSON. The task appends a line to
STARTS when it starts, past the engine.
"""

import asyncio
import json
import os
import sys

from app.taskflow import TaskManager


def main(file: str, starts_file: str, calls: int) -> None:
    ready, tell_ready = os.pipe()
    wait_go, go = os.pipe()
    racers = []
    for _ in range(2):
        if (pid := os.fork()) == 0:
            os.close(go)
            asyncio.run(race(file, starts_file, calls, tell_ready, wait_go))
            return
        racers.append(pid)
    for _ in racers:
        os.read(ready, 1)
    os.close(go)
    for pid in racers:
        os.waitpid(pid, 0)


async def race(file: str, starts_file: str, calls: int, tell_ready: int, wait_go: int) -> None:
    starts = os.open(starts_file, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    manager = TaskManager(snapshot_db=file)

    @manager.task
    async def pay(order: int) -> None:
        os.write(starts, f"{order}\n".encode())

    async with manager.lifespan():
        os.write(tell_ready, b".")
        await asyncio.to_thread(os.read, wait_go, 1)
        ids = await asyncio.gather(*(manager.enqueue(pay, 1, idempotency_key="order-1") for _ in range(calls)))
        os.write(1, json.dumps(sorted(set(ids))).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
