"""APScheduler 3, which takes part in the comparison of schedules: its jobs in SQLite, as ours are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from apscheduler.events import EVENT_JOB_EXECUTED  # type: ignore[import-not-found, unused-ignore]
from apscheduler.jobstores.memory import MemoryJobStore  # type: ignore[import-not-found, unused-ignore]
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore  # type: ignore[import-not-found, unused-ignore]
from apscheduler.schedulers.asyncio import AsyncIOScheduler  # type: ignore[import-not-found, unused-ignore]


async def noop() -> None: ...


class Lateness:
    """Seconds from tick to execution of every run, told by the scheduler itself."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def executed(self, event: Any) -> None:
        tick = event.scheduled_run_time
        self.seconds.append((tick.now(tick.tzinfo) - tick).total_seconds())

    async def read(self) -> list[float]:
        return self.seconds


@asynccontextmanager
async def schedules(database: str, count: int) -> AsyncIterator[Lateness]:
    async with running(SQLAlchemyJobStore(f"sqlite:///{database}"), count) as lateness:
        yield lateness


def schedules_in_memory(_database: str, count: int) -> AbstractAsyncContextManager[Lateness]:
    return running(MemoryJobStore(), count)


@asynccontextmanager
async def running(store: Any, count: int) -> AsyncIterator[Lateness]:
    lateness = Lateness()
    defaults = {"misfire_grace_time": None, "coalesce": False, "max_instances": 100}
    scheduler = AsyncIOScheduler(jobstores={"default": store}, job_defaults=defaults, timezone="UTC")
    scheduler.add_listener(lateness.executed, EVENT_JOB_EXECUTED)
    for number in range(count):
        scheduler.add_job(noop, "interval", seconds=1, start_date="2026-01-01", id=str(number))
    scheduler.start()
    try:
        yield lateness
    finally:
        scheduler.shutdown(wait=False)
