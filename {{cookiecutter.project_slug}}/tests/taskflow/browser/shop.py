"""A shop with tasks of every fate, for a browser to look at."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta

from app.taskflow import QueueConfig, TaskManager, get_task_context, task_log

GATE = threading.Event()


class CardDeclined(Exception):
    pass


def define(manager: TaskManager) -> None:
    manager.queues |= {"mail": QueueConfig(concurrency=4, max_size=500)}

    @manager.task(retries=1, tags={"tenant": "acme"})
    def charge_card(order: int) -> None:
        task_log("calling the provider", order=order)
        raise CardDeclined(f"insufficient funds for order {order}")

    @manager.task
    async def send_email(address: str) -> str:
        task_log("sending", address=address)
        return f"sent to {address}"

    @manager.task
    async def sync_stock(pages: int) -> int:
        for page in range(pages):
            task_log(f"page {page} of {pages}")
            context = get_task_context()
            assert context is not None
            context.progress(page, pages)
            await asyncio.sleep(0.1)
        task_log("the end")
        return pages

    @manager.task
    async def waits() -> None:
        await asyncio.sleep(3_600)

    @manager.schedule(cron="0 8 * * 1-5", timezone="Europe/London")
    def nightly_report() -> None: ...


async def fill(manager: TaskManager) -> None:
    def add(name: str, *args: object, **options: object) -> object:
        return manager.enqueue(manager.registry.named(name).function, *args, **options)  # type: ignore[arg-type]

    charges = [await add("charge_card", order) for order in range(5)]  # type: ignore[misc]
    mails = [await add("send_email", f"user{n}@example.com") for n in range(60)]  # type: ignore[misc]
    for task_id in [*charges, *mails]:
        while not (await manager.store.get(str(task_id))).status.terminal:
            await asyncio.sleep(0.02)
    await add("send_email", "later@example.com", delay_seconds=3_600)  # type: ignore[misc]
    await add("waits")  # type: ignore[misc]
    await manager.schedule_once(
        manager.registry.named("send_email").function,
        "a@example.com",
        run_at=manager.clock() + timedelta(hours=3),
        run_key="remind:991",
    )
    await manager.store.edit_queue("default", {"concurrency": 100}, "ada", "black friday")
    await manager.schedules.run("nightly_report", "ada")
    await manager.recorder.sample()
    await manager.recorder.write()
