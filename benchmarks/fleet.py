"""A fleet of Celery workers, what it costs and what it survives: `python -m benchmarks.fleet [--store postgres|redis]`.

`throughput` drains no-op tasks with one and with three workers, and plain Celery's on the same broker beside them.
`chaos` has two services and three workers, of which one is killed every two seconds while 10,000 tasks are added; the
broker is restarted twice and emptied once. Nothing may be lost, and what may run once may not run twice.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.taskflow.backends import open_backend
from app.taskflow.delivery import celery_app
from app.taskflow.models import TaskStatus

from .__main__ import ROOT, environment
from .drain import module_of_the_tests

TASKS = 10_000
DRAINED = 3_000
KILL_EVERY = 2.0
LONGEST = 300.0
"""Seconds after the last kill, within which everything has to have ended."""


class Fleet:
    def __init__(self, folder: Path, store: str, broker: Any) -> None:
        self.folder, self.store, self.broker = folder, store, broker
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *, plain: bool = False) -> None:
        fleet = {"FLEET_STORE": self.store, "FLEET_BROKER": self.broker.url, "FLEET_FOLDER": str(self.folder)}
        if name.startswith("service"):
            command = [sys.executable, "-m", "benchmarks.fleet_app", "accept", str(TASKS)]
        else:
            command = [sys.executable, "-m", "celery", "-A", "benchmarks.fleet_app", "worker", "-n", f"{name}@%h"]
            command += ["--without-mingle", "--without-gossip"]
        with (self.folder / f"{name}.log").open("ab") as log:
            started = environment() | fleet | ({"FLEET_PLAIN": "1"} if plain else {})
            self.processes[name] = subprocess.Popen(command, cwd=ROOT, env=started, stdout=log, stderr=log)

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def purge(self) -> None:
        app = celery_app(self.broker.url, [])
        with app.connection_for_write() as connection:
            for queue in app.amqp.queues.values():
                bound = queue(connection.default_channel)
                bound.declare()
                bound.purge()

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.processes.clear()


async def counts(store: str) -> Counter[TaskStatus]:
    backend = open_backend(store)
    await backend.open()
    found: Counter[TaskStatus] = Counter()
    for count in await backend.counts():
        found[count.status] += count.n
    await backend.close()
    return found


# -- what it costs


def throughput(fleet: Fleet, workers: int) -> tuple[float, float]:
    """Tasks a second: ours, and plain Celery's."""
    return drain(fleet, workers, plain=False), drain(fleet, workers, plain=True)


def drain(fleet: Fleet, workers: int, *, plain: bool) -> float:
    """All are added first; the clock starts with the workers' first task."""
    fleet.purge()
    (fleet.folder / "starts").unlink(missing_ok=True)
    if plain:
        app = celery_app(fleet.broker.url, [])
        with app.producer_or_acquire() as producer:
            for _ in range(DRAINED):
                app.send_task("plain.noop", queue="default", producer=producer)
    else:
        asyncio.run(add_all(fleet))
    for n in range(workers):
        fleet.start(f"worker{n}", plain=plain)
    while not fleet.lines("starts"):
        time.sleep(0.005)
    began = time.perf_counter()
    while len(fleet.lines("starts")) < DRAINED:
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    fleet.stop()
    return DRAINED / seconds


async def add_all(fleet: Fleet) -> None:
    os.environ |= {"FLEET_STORE": fleet.store, "FLEET_BROKER": fleet.broker.url, "FLEET_FOLDER": str(fleet.folder)}
    from .fleet_app import define

    manager = define()
    manager.deliver_by(fleet.broker.url)
    async with manager.lifespan():
        function = manager.registry.named("short").function
        await asyncio.gather(*(manager.enqueue(function) for _ in range(DRAINED)))
        await asyncio.sleep(DRAINED / 1_000)


# -- what it survives


def chaos(fleet: Fleet) -> bool:
    """Whether nothing was lost or doubled."""
    names = ["service0", "service1", "worker0", "worker1", "worker2"]
    for name in names:
        fleet.start(name)
    kills, restarts, began = 0, 0, time.monotonic()
    purged = False
    while len(fleet.lines("accepted")) < TASKS or kills < 20:
        time.sleep(KILL_EVERY)
        victim = random.choice(names)
        fleet.processes[victim].send_signal(signal.SIGKILL)
        fleet.processes[victim].wait()
        fleet.start(victim)
        kills += 1
        if kills in (8, 16):
            fleet.broker.kill()
            time.sleep(1)
            fleet.broker.start()
            restarts += 1
        if kills == 12 and not purged:
            fleet.purge()
            purged = True
    quiet = time.monotonic()
    while True:
        found = asyncio.run(counts(fleet.store))
        if not found[TaskStatus.PENDING] + found[TaskStatus.RUNNING] or time.monotonic() - quiet > LONGEST:
            break
        time.sleep(1)
    left = found[TaskStatus.PENDING] + found[TaskStatus.RUNNING]
    accepted = dict(line.split() for line in fleet.lines("accepted"))
    starts = Counter(line.split()[0] for line in fleet.lines("starts") if len(line.split()) == 2)
    lost = len(accepted) - asyncio.run(known(fleet.store, list(accepted)))
    doubled = [
        task_id for task_id, n in starts.items() if n > 1 and accepted.get(task_id) in ("short", "plain", "once")
    ]
    print(f"{len(accepted):,} accepted in {time.monotonic() - began:.0f} s, {kills} kills, {restarts} broker restarts:")
    print(f"  {lost} lost, {len(doubled)} doubled, {left} left, {found[TaskStatus.INTERRUPTED]} interrupted;", end=" ")
    print(f"quiet after {time.monotonic() - quiet:.0f} s")
    fleet.stop()
    return not (lost or doubled or left)


async def known(store: str, ids: list[str]) -> int:
    backend = open_backend(store)
    await backend.open()
    found = 0
    for task_id in ids:
        found += await backend.get(task_id) is not None
    await backend.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["postgres", "redis"], default="postgres")
    parser.add_argument("names", nargs="*", default=["throughput", "chaos"])
    options = parser.parse_args()
    servers, brokers = map(module_of_the_tests, ("servers", "brokers"))
    url = servers.redis_url() if options.store == "redis" else servers.postgres_url()
    place = servers.fresh_redis if options.store == "redis" else servers.fresh_postgres
    with brokers.RabbitServer() as broker:
        for name in options.names:
            with place(url) as store, tempfile.TemporaryDirectory() as folder:
                fleet = Fleet(Path(folder), store, broker)
                with suppress(KeyboardInterrupt):
                    if name == "throughput":
                        for workers in (1, 3):
                            ours, plain = throughput(fleet, workers)
                            print(f"{options.store}, {workers} workers: {ours:,.0f} tasks/s, plain Celery {plain:,.0f}")
                    elif not chaos(fleet):
                        sys.exit(1)


if __name__ == "__main__":
    main()
