"""PgQueuer under `killed.py`, with a connection of asyncpg's."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg  # type: ignore[import-not-found, import-untyped, unused-ignore]
import pgqueuer  # type: ignore[import-not-found, unused-ignore]
from pgqueuer.db import AsyncpgDriver  # type: ignore[import-not-found, unused-ignore]
from pgqueuer.queries import Queries  # type: ignore[import-not-found, unused-ignore]

from .killed_job import CONCURRENCY, JOBS, run


@asynccontextmanager
async def driver() -> AsyncIterator[Any]:
    connection = await asyncpg.connect(os.environ["KILLED_POSTGRES"])
    try:
        yield AsyncpgDriver(connection)
    finally:
        await connection.close()


async def from_payload(job: Any) -> None:
    await run(int(job.payload))


@asynccontextmanager
async def manager() -> AsyncIterator[Any]:
    async with driver() as opened:
        queuer = pgqueuer.PgQueuer(opened)
        queuer.entrypoint("job")(from_payload)
        yield queuer


async def add() -> None:
    async with driver() as opened:
        queries = Queries(opened)
        await queries.install()
        await queries.enqueue(["job"] * JOBS, [str(number).encode() for number in range(JOBS)], [0] * JOBS)


async def work() -> None:
    """What `pgq run` does, which fails at its start with today's Typer."""
    await pgqueuer.run(
        manager,
        batch_size=CONCURRENCY // 2,
        max_concurrent_tasks=CONCURRENCY,
        shutdown_on_listener_failure=True,
    )


if __name__ == "__main__":
    asyncio.run(work() if "work" in sys.argv else add())
