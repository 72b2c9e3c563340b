"""One of several processes that add the same task at the same time: `python -m tests.taskflow.race_app FILE STARTS CALLS`.

Says "ready", waits for a line on its standard input, makes its calls at once, and prints the ids it got as JSON. The task
appends a line to STARTS when it starts, past the engine.
"""

import asyncio
import json
import os
import sys

from app.taskflow import TaskManager


async def main(file: str, starts_file: str, calls: int) -> None:
    starts = os.open(starts_file, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    manager = TaskManager(snapshot_db=file)

    @manager.task
    async def pay(order: int) -> None:
        os.write(starts, f"{order}\n".encode())

    async with manager.lifespan():
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        ids = await asyncio.gather(*(manager.enqueue(pay, 1, idempotency_key="order-1") for _ in range(calls)))
        print(json.dumps(sorted(set(ids))), flush=True)
        await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
