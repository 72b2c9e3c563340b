"""Pictures of the dashboard for README and documents: `make pictures`, or `python -m benchmarks.pictures DIRECTORY`.

A shop with a day behind it is seeded into a database of its own, served, and looked at by the Chromium on PATH. With a
directory every screen is taken, light and dark, wide and narrow, to be looked at.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import uvicorn
from app.taskflow import QueueConfig, TaskAdmin, TaskManager, get_task_context, task_log
from app.taskflow.backends.base import GaugeRow, Record
from app.taskflow.deploys import BEGAN
from app.taskflow.history import KEPT, Sums, bucket_of, loads
from app.taskflow.models import TaskStatus, to_micros
from fastapi import FastAPI
from playwright.sync_api import sync_playwright

from .__main__ import PROJECT, ROOT, free_port

SHOTS = {
    ROOT / "docs" / "dashboard.png": "",
    PROJECT / "docs" / "pictures" / "overview.png": "",
    PROJECT / "docs" / "pictures" / "task.png": "/tasks/{failed}",
    PROJECT / "docs" / "pictures" / "dead.png": "/dead",
}
"""Picture -> page."""
SCREENS = {
    "overview": "",
    "tasks": "/tasks",
    "task-failed": "/tasks/{failed}",
    "task-running": "/tasks/{running}",
    "again": "/tasks/{failed}/again",
    "queues": "/queues",
    "schedules": "/schedules",
    "once": "/schedules/once",
    "workers": "/workers",
    "dead": "/dead",
    "audit": "/audit",
    "error": "/tasks/nothing-here",
}
SHAPES = {
    "wide-light": (1440, "light"),
    "wide-dark": (1440, "dark"),
    "narrow-light": (390, "light"),
    "middle-dark": (900, "dark"),
}
"""Width and theme."""


class CardDeclined(Exception):
    pass


def define(manager: TaskManager) -> None:
    @manager.task(retries=2, delay=0.2, queue="billing", tags={"tenant": "acme"})
    def charge_card(order: int, api_key: str) -> None:
        task_log("calling the provider", order=order, api_key=api_key)
        time.sleep(0.05)
        task_log("the provider said no", level="warning", code="card_declined")
        raise CardDeclined(f"insufficient funds for order {order}")

    @manager.task(queue="mail")
    async def send_email(address: str) -> str:
        task_log("sending", address=address)
        await asyncio.sleep(random.uniform(0.02, 0.2))
        return f"sent to {address}"

    @manager.task
    async def build_report(month: str, pages: int) -> dict[str, object]:
        context = get_task_context()
        assert context is not None
        for page in range(pages):
            task_log(f"page {page + 1} of {pages}", rows=page * 250)
            context.progress(page + 1, pages, "reading")
            await asyncio.sleep(1.0)
        return {"month": month, "pages": pages}

    @manager.task
    async def sync_crm(batch: int) -> None:
        if batch % 5 == 0:
            raise TimeoutError("the CRM did not answer within 10 s")

    @manager.schedule(cron="0 8 * * 1-5", timezone="Europe/London")
    async def nightly_report() -> None: ...

    @manager.schedule(every=2)
    async def poll_inbox() -> None: ...


def history(now: datetime) -> Iterator[GaugeRow]:
    """A day of work: busy by day, quiet by night, and a version after which the mails are slower."""
    minute = now.replace(second=0, microsecond=0)
    chance = random.Random(7)
    for ago in range(24 * 60, 0, -1):
        at = minute - timedelta(minutes=ago)
        busy = 40 + 30 * math.sin((at.hour * 60 + at.minute) / 1440 * math.tau - 2) + chance.gauss(0, 6)
        slow = ago < 22
        for name, queue, share, seconds in (
            ("send_email", "mail", 1.0, 0.7 if slow else 0.12),
            ("charge_card", "billing", 0.3, 0.3),
            ("sync_crm", "default", 0.2, 0.05),
        ):
            n = max(1, round(busy * share))
            bad = round(n * (0.02 if name != "sync_crm" else 0.16 if slow else 0.04) + chance.random() * 0.6)
            sums = Sums(
                Counter({"started": n, TaskStatus.SUCCESS: n - bad, TaskStatus.FAILED: bad}),
                Counter({bucket_of(0.02): n}),
                Counter({bucket_of(seconds): n - 1, bucket_of(seconds * 3): 1}),
                n * seconds,
                n * 0.02,
            )
            for size in (60, 3_600):
                yield from rows(size, at, name, queue, sums)
    for ago, version in ((23 * 60, "v41"), (9 * 60, "v42"), (22, "v43")):
        yield row(60, minute - timedelta(minutes=ago), "version", version, Sums(Counter({BEGAN: 1})))


def rows(size: int, at: datetime, name: str, queue: str, sums: Sums) -> Iterator[GaugeRow]:
    for kind, series in (("all", ""), ("queue", queue), ("name", name)):
        yield row(size, at, kind, series, sums)


def row(size: int, at: datetime, kind: str, series: str, sums: Sums) -> GaugeRow:
    seconds = to_micros(at) // 1_000_000
    return GaugeRow(size, (seconds - seconds % size) * 1_000_000, kind, series, sums.dumps())


def added(found: Iterator[GaugeRow]) -> list[GaugeRow]:
    """One row for each bucket and series."""
    sums: dict[tuple[int, int, str, str], Sums] = {}
    for each in found:
        sums.setdefault(each[:4], Sums()).add(loads(each.sums))
    return [GaugeRow(*key, total.dumps()) for key, total in sums.items()]


async def fill(manager: TaskManager) -> dict[str, str]:
    now = manager.clock()
    await manager.journal.obey(Record(added(history(now)), {size: now - keep for size, keep in KEPT.items()}))

    async def add(name: str, *args: object, **options: Any) -> str:
        return await manager.enqueue(manager.registry.named(name).function, *args, **options)

    charges = [await add("charge_card", order, "sk-live") for order in range(988, 997)]
    mails = [await add("send_email", f"user{n}@example.com") for n in range(120)]
    syncs = [await add("sync_crm", batch) for batch in range(12)]
    running = await add("build_report", "2026-10", 400)
    for task_id in [*charges, *mails, *syncs]:
        while not (await manager.store.get(task_id)).status.terminal:
            await asyncio.sleep(0.02)
    for n in range(30):
        await add("send_email", f"later{n}@example.com", delay_seconds=3_600)
    await manager.schedule_once(
        manager.registry.named("send_email").function,
        "ada@example.com",
        run_at=now + timedelta(hours=3),
        run_key="remind:991",
    )
    await manager.store.edit_queue("billing", {"concurrency": 20}, "ada", "month end")
    await manager.store.pause_queue("mail", "ada", "the provider is down until noon")
    await add("send_email", "grace@example.com")
    await asyncio.sleep(12)  # some ticks of the schedules
    await manager.recorder.sample()
    await manager.recorder.write()
    return {"failed": charges[3], "running": running}


def main(directory: Path | None) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no Chromium on PATH")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        queues = {"mail": QueueConfig(concurrency=40, max_size=5_000), "billing": QueueConfig(concurrency=10)}
        manager = TaskManager(snapshot_db=f"{folder}/tasks.db", queues=queues, shutdown_timeout=0.5)
        manager.version = "v43"
        define(manager)
        loops: list[asyncio.AbstractEventLoop] = []

        @asynccontextmanager
        async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
            loops.append(asyncio.get_running_loop())
            yield

        app = FastAPI(lifespan=lifespan)
        TaskAdmin(app, manager, auto_install=True, display_func_args=True)

        port = free_port()
        config = uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        ids = asyncio.run_coroutine_threadsafe(fill(manager), loops[0]).result(120)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def shoot(picture: Path, place: str, width: int, theme: str, height: int, *, whole: bool) -> None:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)  # type: ignore[arg-type]
            page.goto(f"http://127.0.0.1:{port}/tasks/dashboard{place.format(**ids)}")
            page.wait_for_timeout(700)
            picture.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=picture, full_page=whole)
            page.close()
            if (pngquant := shutil.which("pngquant")) is not None:  # a third of the bytes
                subprocess.run([pngquant, "--force", "--strip", "--ext", ".png", "64", picture], check=True)
            print(picture)

        if directory is None:
            for picture, place in SHOTS.items():
                shoot(picture, place, 1280, "light", 800, whole=False)
        else:
            for shape, (width, theme) in SHAPES.items():
                for name, place in SCREENS.items():
                    shoot(directory / f"{name}-{shape}.png", place, width, theme, 900, whole=True)
        browser.close()
        server.should_exit = True
        thread.join(20)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
