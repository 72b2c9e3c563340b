"""Real time, by hand: two instances on one database, under load, fire every tick once. `python -m benchmarks.ticks`.

Prints what was expected and what is in the database, and fails when they differ. Five minutes, or `--minutes N`.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from .__main__ import ROOT, environment

SCHEDULES = {"second": 1_000_000, "minute": 60_000_000}
"""Name -> microseconds from tick to tick."""
WARM_UP = 2.0


async def serve(database: str, seconds: float) -> None:
    """One instance: both schedules, and ten callers who add tasks as fast as they are stored."""
    from app.taskflow import TaskManager

    manager = TaskManager(snapshot_db=database)
    until = time.monotonic() + seconds

    async def noop() -> None: ...

    manager.task(name="load")(noop)
    manager.schedule(every=1, name="second")(noop)
    manager.schedule(cron="* * * * *", name="minute")(noop)

    async def caller() -> None:
        while time.monotonic() < until:
            await manager.enqueue(noop)

    async with manager.lifespan():
        await asyncio.gather(*(caller() for _ in range(10)))


def ticks(database: Path, name: str, start: float, end: float) -> list[int]:
    statement = "SELECT run_at FROM taskflow_task WHERE schedule = ? AND run_at BETWEEN ? AND ? ORDER BY run_at"
    with closing(sqlite3.connect(database)) as connection:
        return [row[0] for row in connection.execute(statement, (name, start * 1e6, end * 1e6))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ticks", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--serve", nargs=2, metavar=("DATABASE", "SECONDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve[0], float(arguments.serve[1])))
        return
    seconds = arguments.minutes * 60 + 2 * WARM_UP
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "tasks.db"
        command: list[Any] = [sys.executable, "-m", "benchmarks.ticks", "--serve", str(database), str(seconds)]
        instances = [subprocess.Popen(command, cwd=ROOT, env=environment()) for _ in range(2)]
        time.sleep(WARM_UP)
        start = time.time()
        time.sleep(arguments.minutes * 60)
        end = time.time()
        if any(instance.wait() for instance in instances):
            sys.exit("an instance failed")
        complete = True
        for name, interval in SCHEDULES.items():
            first, last = int(start * 1e6) // interval + 1, int(end * 1e6) // interval
            expected = [number * interval for number in range(first, last + 1)]
            found = ticks(database, name, start, end)
            print(f"every {name}: {len(expected)} ticks expected, {len(found)} fired, {len(set(found))} different")
            complete = complete and found == expected
        with closing(sqlite3.connect(database)) as connection:
            (load,) = connection.execute("SELECT count(*) FROM taskflow_task WHERE schedule IS NULL").fetchone()
        print(f"beside {load:,} other tasks")
    sys.exit(None if complete else "ticks are missing or doubled")


if __name__ == "__main__":
    main()
