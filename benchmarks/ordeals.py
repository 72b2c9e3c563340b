"""What an instance may go through, with real processes, signals and leases.

`python -m benchmarks.ordeals [--store sqlite|postgres|redis] [NAME ...]`.

Each ordeal prints what was accepted, lost, doubled and left hanging, and fails when the promise of the task system does
not hold: every accepted task ends, and one without `requeue_on_interrupt` starts at most once. By hand, because leases
last 30 s and an outage of 40 s takes 40 s; name one or more, or run them all (about ten minutes).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

from app.taskflow.backends import open_backend
from app.taskflow.models import TaskFilter

from .__main__ import ROOT, environment
from .drain import module_of_the_tests

LEASE = 30.0
OUTAGE = 40.0
STOPS = 200
LONG = 75.0
"""Seconds that a task runs which has to outlive the ordeal."""


# -- an instance


async def serve(folder: Path, clock_file: str) -> None:
    """Runs tasks until it is told to stop, and adds short ones all the time; each start is noted past the engine."""
    from app.taskflow import BackendUnavailable, TaskManager, get_task_context

    stand_in_for_the_clock(clock_file)
    manager = TaskManager(snapshot_db=(folder / "url").read_text(), shutdown_timeout=2.0)
    starts = os.open(folder / "starts", os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    accepted = os.open(folder / "accepted", os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)

    def note() -> None:
        context = get_task_context()
        assert context is not None
        os.write(starts, f"{context.task_id} {context.func_name}\n".encode())

    @manager.task
    async def short() -> None:
        note()

    @manager.task
    def plain() -> None:
        note()

    @manager.task
    async def long(seconds: float) -> None:
        note()
        await asyncio.sleep(seconds)

    @manager.task(requeue_on_interrupt=True)
    async def again(seconds: float) -> None:
        note()
        await asyncio.sleep(seconds)

    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)

    async def add(function: Callable[..., Any], *args: object) -> None:
        try:
            task_id = await manager.enqueue(function, *args)
        except BackendUnavailable:
            return
        os.write(accepted, f"{task_id}\n".encode())

    async def keep_adding() -> None:
        while not stopping.is_set():
            await add(random.choice((short, plain)))
            await asyncio.sleep(0.002)

    async with manager.lifespan():
        if "--long" in sys.argv:
            await add(long, LONG)
            await add(again, LONG)
        adding = asyncio.create_task(keep_adding())
        (folder / f"up-{os.getpid()}").touch()
        await stopping.wait()
        await adding


def stand_in_for_the_clock(clock_file: str) -> None:
    """The wall clock runs as far beside the true one as the file says, from the moment it says so."""
    from app.taskflow import clock

    class Stepped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(seconds=float(Path(clock_file).read_text()))

    if clock_file:
        vars(clock)["datetime"] = Stepped


# -- what happens to it


class Ordeal:
    def __init__(self, folder: Path, server: Any) -> None:
        self.folder = folder
        self.server = server
        """Of the tests, to be killed and started; None where tasks are in a file."""
        self.disk: Path = server.directory if server else folder / "disk"
        """What tasks are kept on."""
        self.url = server.url if server else f"sqlite:///{self.disk / 'tasks.db'}"
        (folder / "url").write_text(self.url)
        self.instances: list[subprocess.Popen[bytes]] = []

    def start(self, *, long: bool = False, clock_file: str = "") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.ordeals", "--serve", str(self.folder), "--clock", clock_file]
        instance = subprocess.Popen([*command, *(["--long"] if long else [])], cwd=ROOT, env=environment())
        self.instances.append(instance)
        deadline = time.monotonic() + 20
        while not (self.folder / f"up-{instance.pid}").exists():
            assert time.monotonic() < deadline, "the instance does not come up"
            assert instance.poll() is None, "the instance died at its start"
            time.sleep(0.02)
        return instance

    def stored(self) -> dict[str, tuple[str, str]]:
        """Task id -> its name and status."""

        async def read() -> dict[str, tuple[str, str]]:
            backend = open_backend(self.url)
            found: dict[str, tuple[str, str]] = {}
            before = None
            while True:
                page = await backend.page(TaskFilter(), before, 500)
                found |= {record.task_id: (record.func_name, record.status.value) for record in page.tasks}
                if (before := page.older) is None:
                    await backend.close()
                    return found

        return asyncio.run(read())

    def accepted(self) -> list[str]:
        return (self.folder / "accepted").read_text().split()

    def started(self) -> Counter[tuple[str, str]]:
        lines = (self.folder / "starts").read_text().splitlines()
        return Counter((task_id, name) for task_id, name in map(str.split, lines))

    def back_at_work(self) -> float:
        """Seconds until tasks are accepted again."""
        known, began = len(self.accepted()), time.monotonic()
        while len(self.accepted()) == known:
            assert time.monotonic() - began < 60, "nothing is accepted any more"
            time.sleep(0.05)
        seconds = time.monotonic() - began
        time.sleep(5)
        assert all(instance.poll() is None for instance in self.instances), "an instance has ended"
        return seconds

    def stop_all(self) -> None:
        for instance in self.instances:
            if instance.poll() is None:
                instance.send_signal(signal.SIGTERM)
        for instance in self.instances:
            instance.wait(30)

    def settle(self, patience: float) -> None:
        """Returns when nothing waits or runs any more."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(1)
            names = ("long", "again")
            if not any(name in names and status in ("pending", "running") for name, status in self.stored().values()):
                return


def outage(ordeal: Ordeal) -> None:
    """Nobody can write for 40 s, while two instances run tasks."""
    for _ in range(2):
        ordeal.start(long=True)
    time.sleep(2)
    if ordeal.server:
        os.kill(ordeal.server.process.pid, signal.SIGSTOP)
        time.sleep(OUTAGE)
        os.kill(ordeal.server.process.pid, signal.SIGCONT)
    else:
        with closing(sqlite3.connect(ordeal.disk / "tasks.db", timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(OUTAGE)
            connection.execute("COMMIT")
    ordeal.settle(LONG + LEASE)


def server_kills(ordeal: Ordeal) -> None:
    """The server is killed three times while two instances are at work, and comes back after ten seconds."""
    if ordeal.server is None:
        return
    for _ in range(2):
        ordeal.start()
    slowest = 0.0
    for _ in range(3):
        time.sleep(5)
        ordeal.server.kill()
        time.sleep(10)
        ordeal.server.start()
        slowest = max(slowest, ordeal.back_at_work())
    print(f"  back at work at most {slowest:.1f} s after the server")


def full(ordeal: Ordeal) -> None:
    """The disk is full three times for ten seconds; a server that ends of it is started again when there is room."""
    for _ in range(2):
        ordeal.start()
    slowest, ended = 0.0, 0
    for _ in range(3):
        time.sleep(5)
        fill(ordeal.disk / "filler")
        time.sleep(10)
        (ordeal.disk / "filler").unlink()
        if ordeal.server and ordeal.server.process.poll() is not None:
            ended += 1
            ordeal.server.start()
        slowest = max(slowest, ordeal.back_at_work())
    print(f"  back at work at most {slowest:.1f} s after there was room; the server ended {ended} times")


def fill(file: Path) -> None:
    """Until not a block is free, and what was just freed is taken, too."""
    with file.open("wb", buffering=0) as filler:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            try:
                filler.write(bytes(65_536))
            except OSError:
                time.sleep(0.01)


def clocks(ordeal: Ordeal) -> None:
    """One of two clocks steps an hour forward, then an hour back behind the true time."""
    clock_file = ordeal.folder / "clock"
    clock_file.write_text("0")
    ordeal.start(long=True, clock_file=str(clock_file))
    ordeal.start(long=True)
    for offset in ("3600", "-3600", "0"):
        time.sleep(15)
        (stepped := clock_file.with_suffix(".next")).write_text(offset)
        stepped.replace(clock_file)  # whole, whenever it is read
    ordeal.settle(LONG + LEASE)


def frozen(ordeal: Ordeal) -> None:
    """One of two instances is suspended for longer than its lease, and goes on."""
    first = ordeal.start(long=True)
    ordeal.start()
    suspend([first])
    ordeal.settle(LONG + 2 * LEASE)


def both_frozen(ordeal: Ordeal) -> None:
    """Two instances are suspended for longer than their leases, and go on: neither is dead to the other."""
    suspend([ordeal.start(long=True), ordeal.start(long=True)])
    ordeal.settle(LONG + 2 * LEASE)


def suspend(instances: list[subprocess.Popen[bytes]]) -> None:
    time.sleep(2)
    for instance in instances:
        instance.send_signal(signal.SIGSTOP)
    time.sleep(LEASE + 15)
    for instance in instances:
        instance.send_signal(signal.SIGCONT)


def stops(ordeal: Ordeal) -> None:
    """200 clean stops beside an instance that writes all the time."""
    ordeal.start()
    slowest = 0.0
    for _ in range(STOPS):
        instance = ordeal.start()
        time.sleep(random.uniform(0, 0.2))
        began = time.monotonic()
        instance.send_signal(signal.SIGTERM)
        instance.wait(30)
        slowest = max(slowest, time.monotonic() - began)
    print(f"  {STOPS} stops, the slowest took {slowest:.2f} s")


def kills(ordeal: Ordeal) -> None:
    """50 SIGKILLs of one of two instances."""
    survivor, victim = ordeal.start(), ordeal.start()
    for _ in range(50):
        time.sleep(random.uniform(0.1, 0.5))
        victim.kill()
        victim.wait()
        survivor, victim = ordeal.start(), survivor
    time.sleep(8)


ORDEALS = (outage, clocks, frozen, both_frozen, stops, kills, server_kills, full)


# -- what came of it


def judge(ordeal: Ordeal, *, spared: bool) -> bool:
    """Whether the promise held. `spared`: nobody died, so nothing may have been interrupted either."""
    accepted = ordeal.accepted()
    stored = {task_id: status for task_id, (_, status) in ordeal.stored().items()}
    lost = [task_id for task_id in accepted if task_id not in stored]
    doubled = [key for key, n in ordeal.started().items() if n > 1 and (spared or key[1] != "again")]
    hanging = [task_id for task_id, status in stored.items() if status == "running"]
    interrupted = sum(status == "interrupted" for status in stored.values())
    print(
        f"  {len(accepted):,} accepted, {len(lost)} lost, {len(doubled)} doubled, {len(hanging)} left running, "
        f"{interrupted} interrupted; {dict(Counter(stored.values()))}"
    )
    return not (lost or doubled or hanging or (spared and interrupted))


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 256 MB in that folder; only root can make one."""
    if os.geteuid() != 0:
        sys.exit("full: run it as root, it mounts a small file system")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m,mode=777", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def ordeal_in(folder: Path, server: Any) -> Iterator[Ordeal]:
    ordeal = Ordeal(folder, server)
    ordeal.disk.mkdir(exist_ok=True)
    try:
        yield ordeal
    finally:
        for instance in ordeal.instances:
            instance.kill()
            instance.wait()


@contextmanager
def server_of(store: str, folder: Path, *, small: bool) -> Iterator[Any]:
    """A server of this ordeal's own, and None for a file; with `small`, on a small disk."""
    servers = module_of_the_tests("servers")
    server = None if store == "sqlite" else servers.PostgresServer() if store == "postgres" else servers.RedisServer()
    with (
        small_disk(server.directory if server else folder / "disk") if small else nullcontext(),
        server or nullcontext(),
    ):
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ordeals", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(each.__name__ for each in ORDEALS)}; default: all")
    parser.add_argument("--store", choices=["sqlite", "postgres", "redis"], default="sqlite")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--clock", default="", help=argparse.SUPPRESS)
    parser.add_argument("--long", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve, arguments.clock))
        return
    failed = []
    for each in ORDEALS:
        if arguments.names and each.__name__ not in arguments.names:
            continue
        print(f"{each.__name__}: {each.__doc__}", flush=True)
        with (
            tempfile.TemporaryDirectory() as folder,
            server_of(arguments.store, Path(folder), small=each is full) as server,
            ordeal_in(Path(folder), server) as ordeal,
        ):
            each(ordeal)
            ordeal.stop_all()
            if not judge(ordeal, spared=each in (outage, clocks, both_frozen)):
                failed.append(each.__name__)
    sys.exit(f"the promise did not hold: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    main()
