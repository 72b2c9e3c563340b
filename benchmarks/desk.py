"""What the dashboard costs beside a million tasks: `python -m benchmarks.desk [--tasks N] [STORE ...]`.

Each store is filled with finished tasks, their events and some log lines, then served with 200 tasks a second running.
Every page and list is asked for by one client, again and again. Then open tabs: what one receives a second, and how
many tasks a second are done without a tab, with one and with a hundred, while tasks come as fast as they are done. A
tab is a stream and the page that it refreshes, as htmx would; all tabs look at the overview and share a session.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from statistics import median, quantiles
from typing import Any

import uvicorn
from app.taskflow import TaskAdmin, TaskManager
from app.taskflow.backends import open_backend
from app.taskflow.backends.base import Backend
from app.taskflow.backends.tables import task as task_table
from app.taskflow.failures import failure_of
from app.taskflow.models import to_micros, utc_now
from fastapi import FastAPI

from .__main__ import ROOT, environment, free_port, wait_for
from .drain import STORES, location
from .load import content_length

TASKS, BATCH = 1_000_000, 2_000
RATE = 200
"""Tasks a second that run while pages are asked for."""
ASKED = 200
"""Times that each page is asked for."""
MEASURED = 10.0
"""Seconds for which tabs are open."""
ROUNDS = 3
WAITING = 2_000
"""Tasks that wait while they come as fast as they are done."""
NAMES = ["send_email", "charge_card", "build_report", "sync_crm", "thumbnail", "nightly"]
QUEUES = ["default", "mail", "billing", "media"]
TRACE = """Traceback (most recent call last):
  File "/srv/app/tasks.py", line 7, in work
    raise Declined()
Declined: x
"""
PAGES = {
    "overview": "/dashboard",
    "overview, 7 d": "/dashboard?span=7d",
    "tasks": "/dashboard/tasks",
    "tasks, failed": "/dashboard/tasks?q=status%3Afailed",
    "tasks, a name": "/dashboard/tasks?q=name%3Acharge_card",
    "tasks, a tag": "/dashboard/tasks?q=tag.tenant%3At7",
    "a task": "/dashboard/tasks/{task}",
    "queues": "/dashboard/queues",
    "schedules": "/dashboard/schedules",
    "workers": "/dashboard/workers",
    "dead": "/dashboard/dead",
    "audit": "/dashboard/audit",
    "GET tasks": "",
    "GET tasks, 500": "?limit=500",
    "GET failed": "?status=failed",
    "GET a name": "?func_name=charge_card",
    "GET metrics": "/metrics",
}


# -- a million tasks


def batches(tasks: int) -> Iterator[Mapping[str, list[dict[str, Any]]]]:
    """Rows of every kind; one task in thirty failed, for one of ten reasons."""
    chance, now, seq = random.Random(7), utc_now(), 0
    day = 86_400_000_000
    columns: dict[str, Any] = dict.fromkeys(column.name for column in task_table.c)
    known: set[str] = set()
    columns |= {"excused": 0, "crashes": 0, "requeue": False, "cancel_requested": False, "source": "manual"}
    for first in range(0, tasks, BATCH):
        found: dict[str, list[dict[str, Any]]] = {"failure": [], "task": [], "event": [], "log": []}
        for number in range(first, min(first + BATCH, tasks)):
            at = to_micros(now) - day * 6 + number * (day * 6 // tasks)
            task_id = str(uuid.UUID(int=at // 1_000 << 80 | 7 << 76 | 2 << 62 | number))
            name, failed = NAMES[number % len(NAMES)], number % 30 == 0
            error = f"declined by provider {'abcdefghij'[number // 30 % 10]}" if failed else None
            cause = failure_of(name, error, TRACE) if failed else None
            row = columns | {
                "task_id": task_id,
                "name": name,
                "queue": QUEUES[number % len(QUEUES)],
                "executor": "async",
                "status": "failed" if failed else "success",
                "attempt": 1,
                "max_attempts": 1,
                "created_at": at,
                "run_at": at,
                "started_at": at + 1_000,
                "finished_at": at + 1_000 + chance.randrange(1_000, 900_000),
                "instance": "before",
                "arguments": f'[["user{number}@example.com"],{{}}]',
                "tags": f'{{"tenant": "t{number % 500}"}}',
                "error": error,
                "stacktrace": TRACE if failed else None,
                "error_key": cause and cause.key,
            }
            found["task"].append(row)
            if cause and cause.key not in known:
                known.add(cause.key)
                found["failure"].append(
                    {"error_key": cause.key, "name": name, "error_type": cause.error_type, "message": cause.message}
                    | {"frame": cause.frame, "first_at": at, "last_at": at, "open": 0, "dismissed": 0}
                )
            for kind in ("created", "started", row["status"] if failed else "succeeded"):
                seq += 1
                found["event"].append(
                    {"seq": seq, "task_id": task_id, "at": at, "kind": kind, "attempt": 0, "instance": "before"}
                    | {"actor": None, "detail": None}
                )
            if number % 10 == 0:
                found["log"].append(
                    {"seq": seq, "task_id": task_id, "at": at, "level": "info", "attempt": 0, "message": "sent"}
                    | {"extra": "{}"}
                )
        yield found


async def fill(url: str, tasks: int) -> None:
    backend: Backend = open_backend(url)
    await backend.open()
    for found in batches(tasks):
        for kind, rows in found.items():
            if rows:
                await backend.load(kind, rows)
    await backend.close()


# -- the service that is asked


def serve(url: str, port: int, rate: int) -> None:
    """`rate`: tasks a second that it adds; 0 for as many as are done, counted on its standard output each second."""
    manager = TaskManager(snapshot_db=url, shutdown_timeout=1.0)

    done = 0

    @manager.task
    async def send_email(number: int) -> None:
        nonlocal done
        done += 1

    async def steadily() -> None:
        while True:
            due = time.monotonic() + 0.1
            await asyncio.gather(*(manager.enqueue(send_email, n) for n in range(rate // 10)))
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def as_fast_as_they_are_done() -> None:
        added = 0
        while True:
            if added - done < WAITING:
                await asyncio.gather(*(manager.enqueue(send_email, n) for n in range(200)))
                added += 200
            else:
                await asyncio.sleep(0.005)

    async def count() -> None:
        while True:
            before, began = done, time.monotonic()
            await asyncio.sleep(1.0)
            print((done - before) / (time.monotonic() - began), flush=True)

    working: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        working.extend(map(asyncio.create_task, [steadily()] if rate else [as_fast_as_they_are_done(), count()]))
        yield
        for work in working:
            work.cancel()

    app = FastAPI(lifespan=lifespan)
    TaskAdmin(app, manager, auto_install=True)
    uvicorn.run(app, port=port, log_level="error", timeout_graceful_shutdown=1)


@contextmanager
def served(url: str, rate: int) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.desk", "--serve", url, str(port), str(rate)]
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        wait_for(port)
        time.sleep(2.0)
        yield port, server
    finally:
        server.terminate()
        server.wait()


# -- who asks


def request(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]).encode()


async def ask(port: int, path: str) -> tuple[int, int, bytes]:
    """Status, bytes received, and the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(path, "Connection: close"))
    answer = await reader.read(-1)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), len(answer), body


async def pages(port: int) -> None:
    _, _, body = await ask(port, "/tasks?limit=1")
    task = body.partition(b'"task_id":"')[2][:36].decode()
    for name, page in PAGES.items():
        took = []
        for _ in range(ASKED):
            began = time.perf_counter()
            status, size, _ = await ask(port, "/tasks" + page.format(task=task))
            took.append((time.perf_counter() - began) * 1000)
            if status != 200:
                raise RuntimeError(f"{page} answered {status}")
        print(f"  {name:<16} p50 {median(took):>7.1f}   p95 {quantiles(took, n=20)[-1]:>7.1f} ms   {size:>9,} bytes")


class Tab:
    """An overview that is looked at: its stream, and a refresh after each news."""

    def __init__(self, port: int) -> None:
        self.port, self.received = port, 0
        self._news = asyncio.Event()

    async def look(self) -> None:
        await asyncio.gather(self._listen(), self._refresh())

    async def _listen(self) -> None:
        last = "0"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while True:
            writer.write(request("/tasks/dashboard/stream", f"Last-Event-ID: {last}"))
            await self._head(reader)
            while size := int(await reader.readline(), 16):
                chunk = await reader.readexactly(size + 2)
                self.received += len(chunk)
                for line in chunk.splitlines():
                    if line.startswith(b"id:"):
                        last = line[3:].strip().decode()
                        self._news.set()
            await reader.readline()
            await asyncio.sleep(0.1)

    async def _refresh(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while True:
            self._news.clear()
            await self._news.wait()
            writer.write(request("/tasks/dashboard", "HX-Request: true", "Accept-Encoding: gzip"))
            head = await self._head(reader)
            self.received += len(await reader.readexactly(content_length(head)))

    async def _head(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        self.received += len(head)
        return head


async def watch(port: int, tabs: int, seconds: float) -> float:
    """Bytes a second that each tab receives."""
    opened = [Tab(port) for _ in range(tabs)]
    looking = [asyncio.create_task(tab.look()) for tab in opened]
    await asyncio.sleep(seconds)
    for work in looking:
        work.cancel()
    await asyncio.gather(*looking, return_exceptions=True)
    return sum(tab.received for tab in opened) / max(1, tabs) / seconds


def done_with(tabs: int, url: str) -> float:
    """Tasks a second while so many tabs are open."""
    with served(url, 0) as (port, server):
        assert server.stdout is not None
        os.set_blocking(server.stdout.fileno(), False)
        if tabs:
            command = [sys.executable, "-m", "benchmarks.desk", "--watch", str(port), str(tabs)]
            watching = subprocess.Popen(command, cwd=ROOT, env=environment())
        time.sleep(3.0)
        server.stdout.read()
        time.sleep(MEASURED)
        counted = [float(line) for line in (server.stdout.read() or "").split()]
        if tabs:
            watching.kill()
            watching.wait()
    return median(counted)


def tabs(url: str) -> None:
    with served(url, RATE) as (port, _):
        print(f"  a tab receives {asyncio.run(watch(port, 1, MEASURED)) / 1000:.1f} kB/s at {RATE} tasks/s")
    found: dict[int, list[float]] = {0: [], 1: [], 100: []}
    for _ in range(ROUNDS):
        for number, rates in found.items():
            rates.append(done_with(number, url))
    alone = median(found[0])
    for number, rates in found.items():
        each = [round(rate) for rate in rates]
        print(f"  {number:>3} tabs {median(rates):>8,.0f} tasks/s   {median(rates) / alone:.2f}   {each}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="*", default=STORES)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--serve", nargs=3)
    parser.add_argument("--watch", nargs=2, type=int)
    arguments = parser.parse_args()
    if arguments.serve:
        url, port, rate = arguments.serve
        serve(url, int(port), int(rate))
    elif arguments.watch:
        asyncio.run(watch(arguments.watch[0], arguments.watch[1], 3600.0))
    else:
        for store in arguments.stores:
            with location(store) as url:
                began = time.monotonic()
                asyncio.run(fill(url, arguments.tasks))
                print(f"\n{store}: {arguments.tasks:,} tasks, filled in {time.monotonic() - began:.0f} s", flush=True)
                with served(url, RATE) as (port, _):
                    asyncio.run(pages(port))
                tabs(url)


if __name__ == "__main__":
    main()
